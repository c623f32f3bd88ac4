"""The server behind a page: who may call it, and the routes of judging.

    GET  /api/next?labeler=NAME    gives {"id", "kind", "prompt" or "messages", "responses"}
    POST /api/answer               takes {"id", "labeler", "answer"}
    POST /api/undo                 takes {"labeler"}

An error is {"error": why}. On the loopback a request must name this machine as its Host and, where
a browser says which page sends it, this page as its Origin: then no other page can read or answer,
not even one whose name was pointed to this machine (DNS rebinding). Elsewhere a token is needed.
"""

import hmac
import ipaddress
import re
import secrets
import unicodedata
from pathlib import Path

from nanorlhf.config import die, reason
from nanorlhf.data.formats import package
from nanorlhf.human.journal import Refused

STATIC = Path(__file__).with_name("static")
POLICY = (  # nothing from elsewhere, and no script but our own
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LARGEST_BODY = 2**16  # bytes of a judgement; a conversation may have more
LONGEST_NAME = 64


def packages():
    """Flask and waitress; exits 2 with how to install them."""
    return [package(name, "the page", "human") for name in ("flask", "waitress")]


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_app(page, token="", largest=LARGEST_BODY):
    """A Flask app that shows a page of STATIC to whoever may see it. `token`: what a caller must
    show; "" on the loopback. `largest`: bytes of a request's body."""
    flask, _ = packages()
    from werkzeug.exceptions import HTTPException

    app = flask.Flask("nanorlhf", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = largest

    @app.before_request
    def guard():
        request = flask.request
        named = request.headers.get("Host", "")
        name = re.sub(r":\d+$", "", named).strip("[]").lower()
        if not token and named and not is_loopback(name):
            flask.abort(403, "a foreign Host")
        origin = request.headers.get("Origin")
        if origin is not None and origin not in (f"http://{named}", f"https://{named}"):
            flask.abort(403, "a foreign Origin")
        shown = request.headers.get("Authorization", "").removeprefix("Bearer ")
        shown = shown or request.args.get("token", "")
        if (
            token
            and request.endpoint != "asset"
            and not hmac.compare_digest(shown.encode(), token.encode())
        ):
            flask.abort(401, "the token is missing, or another")

    @app.after_request
    def headers(response):
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"  # which would show the token
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.get("/")
    def index():
        return flask.send_from_directory(STATIC, page)

    @app.get("/<name>")
    def asset(name):
        return flask.send_from_directory(STATIC, name)

    @app.errorhandler(Refused)
    def refused(error):
        return {"error": str(error)}, error.status

    @app.errorhandler(RecursionError)
    def too_deep(error):
        return {"error": "nested too deeply"}, 400

    @app.errorhandler(HTTPException)
    def wrong(error):
        return {"error": error.description}, error.code

    return app


def judging(desk, guidelines="", token=""):
    """The app of the page on which people answer a Desk's questions."""
    app, flask = make_app("judge.html", token), packages()[0]

    @app.get("/api/next")
    def next_question():
        asked, progress = desk.next(name_of(flask, flask.request.args.get("labeler")))
        if asked is None:
            return {"done": True, "progress": progress}, 404
        found = {"id": asked.id, "kind": desk.kind, "responses": asked.shown("responses")}
        found |= asked.question.asked | {"progress": progress, "guidelines": guidelines}
        return found | ({"repeat_of": asked.repeat_of} if asked.repeat_of else {})

    @app.post("/api/answer")
    def answer():
        given = body(flask)
        if not isinstance(given.get("id"), str) or "answer" not in given:
            flask.abort(400, "needs id, labeler and answer")
        desk.answer(name_of(flask, given.get("labeler")), given["id"], given["answer"])
        return {"saved": given["id"]}

    @app.post("/api/undo")
    def undo():
        return {"undone": desk.undo(name_of(flask, body(flask).get("labeler")))}

    return app


def body(flask):
    given = flask.request.get_json()  # 400 where it is no JSON, 415 where it says so
    if not isinstance(given, dict):
        flask.abort(400, "an object is needed")
    return given


def name_of(flask, labeler):
    """A labeler's name as it is kept: however it was typed, the same letters are the same name."""
    name = unicodedata.normalize("NFC", labeler).strip() if isinstance(labeler, str) else ""
    if not 0 < len(name) <= LONGEST_NAME or {unicodedata.category(c) for c in name} & {"Cc", "Cs"}:
        flask.abort(400, f"labeler must be a name of at most {LONGEST_NAME} characters")
    return name


def listen(make, host, port):
    """(server, its address) for make(token=...), an app; it answers once its run() is called. Off
    the loopback a token is made."""
    _, waitress = packages()
    host = "127.0.0.1" if host == "localhost" else host  # one address, not two
    token = "" if is_loopback(host) else secrets.token_urlsafe(16)
    app = make(token=token)
    most = {"max_request_body_size": app.config["MAX_CONTENT_LENGTH"] + 1}
    try:
        server = waitress.create_server(app, host=host, port=port, threads=8, ident=None, **most)
    except (OSError, ValueError) as error:
        die(f"--host {host} --port {port}: {reason(error)}; --port 0 takes a free one")
    name = f"[{host}]" if ":" in host else host
    query = f"?token={token}" if token else ""
    return server, f"http://{name}:{server.effective_port}/{query}"
