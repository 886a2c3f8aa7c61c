#!/usr/bin/env bash
# python-dotenv: ${x} is expanded inside single quotes, and nothing keeps one value from it.
#
# Packages: python-dotenv 1.2.4
# Behaviour: quotes decide about escapes only; variables are expanded in the parsed value,
#   whatever the quotes were, and \$ is no escape. A secret with ${...} in it loses that part.
# Seen (2026-11-29): KEY='sk-${a}b' and KEY="sk-\${a}b" give "sk-b" and "sk-\b"; the shell that
#   sources the same file says "sk-${a}b" both times. interpolate=False expands nothing at all.
# One would have guessed: single quotes are literal as in sh (and in Docker Compose's .env).
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check 'python-dotenv==1.2.4'
cat > "$dir/env" <<'ENV'
SINGLE='sk-${not_set_a}b'
DOUBLE="sk-\${not_set_a}b"
ENV
shell=$(. "$dir/env" && echo "$SINGLE $DOUBLE")
python=$("$dir/venv/bin/python" - "$dir/env" <<'PY'
import sys

from dotenv import dotenv_values

values = dotenv_values(sys.argv[1])
print(values["SINGLE"], values["DOUBLE"])
assert dotenv_values(sys.argv[1], interpolate=False)["SINGLE"] == "sk-${not_set_a}b"
PY
)
echo "shell: $shell, python-dotenv: $python"
[ "$shell" = 'sk-${not_set_a}b sk-${not_set_a}b' ]
[ "$python" = 'sk-b sk-\b' ]
