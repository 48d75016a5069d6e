"""A local server that speaks the chat-completions protocol, and misbehaves on demand.

What it answers is read off the images that it is sent: the brighter video has fewer artifacts.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Question = list[dict[str, Any]]


@dataclass(kw_only=True)
class Reply:
    """What the server sends back."""

    text: str | None = '{"better": "tie", "reason": "alike"}'
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    body: bytes | None = None
    """Instead of a well-formed one."""


@dataclass
class Server:
    """A running server: what it was asked, and how it answers."""

    url: str
    answer: Callable[[Question], Reply]
    faults: list[Reply] = field(default_factory=list)
    """Sent first, one a request."""
    questions: list[Question] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


def images(question: Question) -> list[np.ndarray]:
    """The pixels of all images in a question."""
    urls = [part["image_url"]["url"] for part in question if part["type"] == "image_url"]
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))))
        for url in urls
    ]


def brighter(question: Question) -> Reply:
    """The first half of the images is the first video's."""
    shown = [float(image.mean()) for image in images(question)]
    lead = sum(shown[: len(shown) // 2]) - sum(shown[len(shown) // 2 :])
    better = "first" if lead > 0 else "second" if lead < 0 else "tie"
    return Reply(text=json.dumps({"better": better, "reason": "cleaner"}))


@contextmanager
def serving(answer: Callable[[Question], Reply] = brighter) -> Iterator[Server]:
    """Serve on a free port of this machine."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.bodies.append(body)
                server.questions.append(body["messages"][0]["content"])
                server.keys.append(self.headers["Authorization"])
                server.times.append(time.monotonic())
                reply = server.faults.pop(0) if server.faults else None
            reply = reply or server.answer(body["messages"][0]["content"])
            if self.path != "/v1/chat/completions":
                reply = Reply(status=404)
            time.sleep(reply.delay)
            data = reply.body if reply.body is not None else json.dumps(_completion(reply)).encode()
            try:
                self.send_response(reply.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client had no more patience

        def log_message(self, *arguments: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{listener.server_port}/v1", answer)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


def _completion(reply: Reply) -> dict[str, Any]:
    if reply.status != 200:
        return {"error": {"message": reply.text, "type": "error"}}
    message = {"role": "assistant", "content": reply.text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "local",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 20, "total_tokens": 1020},
    }
