"""The page of tools/merge.py --serve: its addresses, who may open them, and the server.

| address | answer |
|---|---|
| GET / | the page |
| GET /status | state, output and progress of the merge |
| POST /check | what --dry-run prints, or why it refuses |
| POST /merge | write the recipe and start the merge |
| POST /cancel | interrupt it |
| GET /report | the report of the finished merge |

The server listens on 127.0.0.1 alone. The user's browser also runs pages of other sites, and other users of the machine
reach its loopback address too; so each request needs the token of this start, which only the printed URL has, and a
Host header of this machine (a foreign name that resolves to 127.0.0.1 is refused: DNS rebinding).
"""

import argparse
import hmac
import os
import secrets
import shlex
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trinity.errors import UserError, explain
from trinity.interop.output_folder import OVERWRITE_HINT
from trinity.io.json_files import to_json
from trinity.io.local import resolve_path, write_atomically
from trinity.reporting.merge_server.form import (
    Form,
    command_words,
    recipe_file,
    recipe_text,
    report_file,
    write_recipe,
)
from trinity.reporting.merge_server.job import MergeJob
from trinity.reporting.merge_server.template import OVERWRITE_LABEL, render

if TYPE_CHECKING:  # Werkzeug may not be installed
    from werkzeug.wrappers import Request, Response

LOOPBACK = "127.0.0.1"
HOSTS = (LOOPBACK, "localhost")
"""Accepted in the Host header, with any port: an SSH tunnel may have another one at its near end."""
MOST_BYTES = 1 << 20
"""Of a form."""
OVERWRITE_ON_PAGE = f'tick "{OVERWRITE_LABEL}"'

Check = Callable[[list[str]], str]
"""Words of a command line of tools/merge.py → what --dry-run prints. Raises UserError."""

_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""A report has an origin of its own, so that no script in it reaches this server."""


def serve(program: str, check: Check, port: int) -> NoReturn:
    """Serve the page until Ctrl-C, which also interrupts a running merge.

    Args:
        program: path of tools/merge.py.
        check: carries out a dry run in this process.
        port: TCP port; 0 for any free one.
    Raises:
        UserError: Werkzeug is not installed, or the port cannot be used.
        KeyboardInterrupt: at the end.
    """
    app = MergeApp(program, check)
    server = make_server(app, port)
    if threading.current_thread() is threading.main_thread():
        # all end it as Ctrl-C does, so that no merge is left behind; SIGINT may be ignored in a shell's background
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
    print(f"the page is at {app.url(server.port)}\nIts merges run in {os.getcwd()}. Ctrl-C ends it.", flush=True)
    try:
        server.serve_forever()
    finally:
        app.job.stop()
    raise KeyboardInterrupt


def make_server(app: "MergeApp", port: int) -> Any:
    """A server on 127.0.0.1 with a thread for each request.

    Returns:
        Werkzeug's server, listening; `port` is its port.
    Raises:
        UserError: the port is in use, or not allowed.
    """
    from werkzeug import serving

    class Handler(serving.WSGIRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Log nothing: the address holds the token."""

    with socket.socket() as listening:  # the server duplicates it
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((LOOPBACK, port))
            listening.listen()
        except OverflowError:
            raise UserError(f"--port {port} is no port; give a number from 0 to 65535") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"--port {port} cannot be used ({reason}); give another, or 0 for any free port") from None
        return serving.make_server(LOOPBACK, port, app, threaded=True, request_handler=Handler, fd=listening.fileno())


class MergeApp:
    """The WSGI application.

    Args:
        program: path of tools/merge.py.
        check: see `serve`.

    Attributes:
        job: the merge that runs, or the last one.
        token: of this start.
    """

    def __init__(self, program: str, check: Check) -> None:
        try:
            import werkzeug  # noqa: F401
        except ImportError:
            raise UserError('--serve needs werkzeug; install it: pip install "trinity-moe[serve]"') from None
        self.job = MergeJob()
        self.token = secrets.token_urlsafe(16)
        self._program, self._check = Path(program).resolve(), check
        self._one = threading.Lock()  # one check or start at a time
        self._addresses: dict[tuple[str, str], Callable[[Request], Response]] = {
            ("GET", "/"): self._page,
            ("GET", "/status"): lambda request: self._json(self.job.status()),
            ("GET", "/report"): self._report,
            ("POST", "/check"): self._checked,
            ("POST", "/merge"): self._merge,
            ("POST", "/cancel"): self._cancel,
        }

    def url(self, port: int) -> str:
        """The address of the page, with the token."""
        return f"http://{LOOPBACK}:{port}/?token={self.token}"

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        """Answer a request."""
        from werkzeug.wrappers import Request

        return self._answer(Request(environ))(environ, start_response)

    def _answer(self, request: "Request") -> "Response":
        from werkzeug.sansio.utils import host_is_trusted

        request.max_content_length = MOST_BYTES
        if not host_is_trusted(request.environ.get("HTTP_HOST"), HOSTS):
            return self._json({"error": f"the Host header must be {LOOPBACK} or localhost"}, 403)
        # a page of another origin cannot set the header; the address of a POST does not count
        given = request.headers.get("X-Token", "" if request.method == "POST" else request.args.get("token", ""))
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return self._json({"error": "the token is missing or of an earlier start; open the printed URL"}, 403)
        answer = self._addresses.get((request.method, request.path))
        return self._json({"error": "there is no such page"}, 404) if answer is None else answer(request)

    def _page(self, request: "Request") -> "Response":
        return self._response(render(self.token, os.getcwd()), "text/html")

    def _report(self, request: "Request") -> "Response":
        report = self.job.finished("report")
        try:
            content = None if report is None else report.read_bytes()
        except OSError:
            content = None
        if content is None:
            return self._json({"error": "there is no report; merge with one first"}, 404)
        return self._response(content, "text/html", policy=_REPORT_POLICY)

    def _checked(self, request: "Request") -> "Response":
        return self._do(request, self._dry_run)

    def _dry_run(self, form: Form) -> dict[str, Any]:
        """The plan and the recipe, for a form that can be merged."""
        recipe_file(form)
        with tempfile.TemporaryDirectory() as folder:
            path, text = Path(folder) / "recipe.yaml", recipe_text(form)
            write_atomically(path, text)
            try:
                return {"plan": self._check(command_words(form, path)), "recipe": text}
            except UserError as error:
                said = str(error).replace(f"the recipe {path}", "the recipe").replace(OVERWRITE_HINT, OVERWRITE_ON_PAGE)
                raise UserError(said) from None

    def _merge(self, request: "Request") -> "Response":
        def run(form: Form) -> dict[str, Any]:
            if self.job.running:
                raise UserError("a merge is running; wait for it, or cancel it")
            self._dry_run(form)  # refuses before the recipe of an earlier merge is replaced
            words = command_words(form, write_recipe(form))
            report, here = report_file(form), Path.cwd()
            program = self._program.relative_to(here) if self._program.is_relative_to(here) else self._program
            about = {
                "command": shlex.join(["python", str(program), *words]),
                "report": None if report is None else str(resolve_path(report)),
                "form": form,
            }
            self.job.start([sys.executable, str(self._program), *words], about)
            return self.job.status()

        return self._do(request, run)

    def _cancel(self, request: "Request") -> "Response":
        self.job.cancel()
        return self._json(self.job.status())

    def _do(self, request: "Request", run: Callable[[Form], dict[str, Any]]) -> "Response":
        """Run with the form of a request; a refusal is one sentence."""
        from werkzeug.exceptions import HTTPException

        try:
            form = request.get_json(silent=True)
        except HTTPException:  # too large
            form = None
        if not isinstance(form, dict):
            return self._json({"error": "the request holds no form as JSON"}, 400)
        try:
            with self._one:
                return self._json(run(form))
        except argparse.ArgumentError as error:
            return self._json({"error": str(error)}, 400)
        except Exception as error:
            if (explained := explain(error)) is not None:
                return self._json({"error": explained[1]}, 400)
            traceback.print_exc()
            return self._json({"error": "this is a bug of Trinity; the terminal shows the traceback"}, 500)

    def _json(self, content: dict[str, Any], code: int = 200) -> "Response":
        return self._response(to_json(content), "application/json", code)

    def _response(self, content: str | bytes, kind: str, code: int = 200, policy: str = _PAGE_POLICY) -> "Response":
        from werkzeug.wrappers import Response

        headers = {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        return Response(content, code, headers, content_type=f"{kind}; charset=utf-8")
