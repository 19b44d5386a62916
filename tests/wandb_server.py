"""A server that answers the Weights & Biases client as far as a run needs, until it is told not to.

It keeps nothing but counts. `stop` refuses connections from then on, as a machine does that has
gone; `hang` accepts them and never answers, as a broken one does.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "somebody"


class WandbServer:
    """A context manager; `url` is for `WANDB_BASE_URL`.

    Args:
        at: called before each answer with the kind of the request.
    """

    def __init__(self, at: Callable[["WandbServer", str], None] = lambda server, kind: None):
        self.at = at
        self.counts: Counter[str] = Counter()
        self.stopped = False
        self.hanging = threading.Event()
        self.leaving = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.answer(self, body)

            do_PUT = do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # a client that has gone away
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)

    def __enter__(self) -> "WandbServer":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.leaving.set()
        self.stop()

    def stop(self) -> None:
        """Refuse connections from now on, and answer none that is open."""
        self.stopped = True
        if self.thread.is_alive():
            self.http.shutdown()
            self.thread.join()
        self.http.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        kind, content = self.understand(handler.path, body)
        self.counts[kind] += 1
        self.at(self, kind)
        if self.hanging.is_set():
            self.leaving.wait(600)
        if self.hanging.is_set() or self.stopped:
            handler.close_connection = True
            return
        payload = json.dumps(content).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload)

    def understand(self, path: str, body: bytes) -> tuple[str, dict[str, Any]]:
        """Return the kind of a request, and what it is answered."""
        if "file_stream" in path:
            return "records", {}
        if not path.endswith("/graphql"):
            return path, {}
        request = json.loads(body)
        query, variables = request["query"], request.get("variables") or {}
        if "upsertBucket" in query:
            project = {"id": "p", "name": variables.get("project") or "project"}
            project["entity"] = {"id": "e", "name": ENTITY}
            bucket = {
                "id": "b", "name": variables.get("name"), "displayName": variables.get("name"),
                "description": None, "config": "{}", "sweepName": None, "project": project,
                "historyLineCount": 0,
            }  # fmt: skip
            return "run", {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in query:
            files = [
                {"name": name, "uploadUrl": f"{self.url}/upload/{name}"}
                for name in variables.get("files", [])
            ]
            created = {"runID": "b", "uploadHeaders": [], "files": files}
            return "files", {"data": {"createRunFiles": created}}
        viewer = {
            "id": "v", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []},
        }  # fmt: skip
        if "artifact(name" in query:
            return "artifact", {"data": {"project": {"artifact": None}}}
        return "other", {"data": {"viewer": viewer, "serverInfo": None}}
