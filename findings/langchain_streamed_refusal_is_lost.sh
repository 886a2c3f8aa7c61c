#!/usr/bin/env bash
# langchain-openai: a refusal that is streamed becomes an empty answer that "stopped" well.
#
# Packages: langchain-openai 1.7.4, langchain-core 1.8.3, openai 3.57.0
# Behaviour: chat completions put a refusal into `refusal` beside `content`. invoke() keeps it in
#   additional_kwargs; the conversion of streamed deltas knows content, tool calls and function
#   calls only.
# Seen (2026-11-29): invoke: additional_kwargs {"refusal": "I will not."}; stream: content "",
#   additional_kwargs {}, finish_reason "stop".
# One would have guessed: both ways tell the same.
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

from langchain_openai import ChatOpenAI

CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
MESSAGE = {"role": "assistant", "content": None, "refusal": "I will not."}
ANSWER = CHUNK | {
    "object": "chat.completion", "choices": [{"index": 0, "finish_reason": "stop", "message": MESSAGE}]
}


def event(delta, finish=None):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps(CHUNK | {'choices': [choice]})}\n\n"


STREAM = (
    event({"role": "assistant", "content": "", "refusal": None})
    + event({"refusal": "I will "}) + event({"refusal": "not."}) + event({}, "stop")
    + "data: [DONE]\n\n"
)


class Upstream(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if asked.get("stream") else "application/json")
        self.end_headers()
        self.wfile.write((STREAM if asked.get("stream") else json.dumps(ANSWER)).encode())

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Upstream)
Thread(target=server.serve_forever, daemon=True).start()
model = ChatOpenAI(
    model="m", api_key="none", base_url=f"http://127.0.0.1:{server.server_port}", max_retries=0, timeout=10
)
plain = model.invoke("hi")
pieces = list(model.stream("hi"))
streamed = sum(pieces[1:], pieces[0])
print(plain.additional_kwargs, repr(streamed.content), streamed.additional_kwargs, streamed.response_metadata)
assert plain.additional_kwargs["refusal"] == "I will not."
assert streamed.response_metadata["finish_reason"] == "stop"
assert streamed.content == "" and "I will" not in streamed.model_dump_json()
PY
