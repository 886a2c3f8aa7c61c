#!/usr/bin/env bash
# langchain-openai: the running usage of a stream is added up; the bill grows with the chunks.
#
# Packages: langchain-openai 1.7.4, langchain-core 1.8.3, openai 3.57.0
# Behaviour: with `stream_options: {"continuous_usage_stats": true}` (vLLM) every chunk carries
#   the usage so far. LangChain makes usage_metadata of each chunk, and the sum of its chunks
#   adds the figures, though each already holds the ones before.
# Seen (2026-11-29): 10 prompt and 3 completion tokens, told on four chunks: LangChain says 40
#   and 9; openai-python's own helper, which keeps the last figure, 10 and 3.
# One would have guessed: the last usage wins.
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check \
  'langchain-openai==1.7.4' 'langchain-core==1.8.3' 'openai==3.57.0'
"$dir/venv/bin/python" - <<'PY'
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import openai
from langchain_openai import ChatOpenAI

CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
OPTIONS = {"include_usage": True, "continuous_usage_stats": True}


def event(choices, completion):
    usage = {"prompt_tokens": 10, "completion_tokens": completion, "total_tokens": 10 + completion}
    return f"data: {json.dumps(CHUNK | {'choices': choices, 'usage': usage})}\n\n"


def choice(text, finish=None):
    return [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]


class Upstream(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert asked["stream_options"] == OPTIONS
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        body = event(choice("a"), 1) + event(choice("b"), 2) + event(choice("c", "stop"), 3) + event([], 3)
        self.wfile.write(body.encode() + b"data: [DONE]\n\n")

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Upstream)
Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}"

model = ChatOpenAI(
    model="m", api_key="none", base_url=url, max_retries=0, timeout=10, extra_body={"stream_options": OPTIONS}
)
pieces = list(model.stream("hi"))
usage = sum(pieces[1:], pieces[0]).usage_metadata
client = openai.OpenAI(api_key="none", base_url=url, max_retries=0, timeout=10)
with client.chat.completions.stream(model="m", messages=[], stream_options=OPTIONS) as stream:
    own = stream.get_final_completion().usage
print(usage, own)
assert (own.prompt_tokens, own.completion_tokens) == (10, 3)
assert (usage["input_tokens"], usage["output_tokens"]) == (40, 9)
PY
