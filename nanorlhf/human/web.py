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
HEADERS = {
    # nothing from elsewhere, and no script but our own
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # a referrer would show the token
    "Cache-Control": "no-store",
}
LARGEST_BODY = 2**16  # bytes of a judgement; a conversation may have more
LONGEST_NAME = 64


def check_packages():
    """Exits 2 with how to install Flask and waitress, where one is missing."""
    for name in ("flask", "waitress"):
        package(name, "the page", "human")


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_app(page, token="", largest=LARGEST_BODY):
    """A Flask app that shows a page of STATIC to whoever may see it. `token`: what a caller must
    show; "" on the loopback. `largest`: bytes of a request's body."""
    import flask  # here, as it is an extra
    from werkzeug.exceptions import HTTPException

    app = flask.Flask("nanorlhf", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = largest
    app.register_error_handler(Refused, lambda e: ({"error": str(e)}, e.status))
    app.register_error_handler(HTTPException, lambda e: ({"error": e.description}, e.code))
    app.register_error_handler(RecursionError, lambda e: ({"error": "nested too deeply"}, 400))

    @app.get("/", endpoint="page")
    @app.get("/<name>", endpoint="asset")
    def file(name=page):
        return flask.send_from_directory(STATIC, name)

    @app.before_request
    def guard():
        request = flask.request
        host = request.headers.get("Host", "")
        name = re.sub(r":\d+$", "", host).strip("[]").lower()
        if not token and host and not is_loopback(name):
            raise Refused(403, "a foreign Host")
        own = (f"http://{host}", f"https://{host}")
        if request.headers.get("Origin", own[0]) not in own:
            raise Refused(403, "a foreign Origin")
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        given = (given or request.args.get("token", "")).encode()
        is_public = not token or request.endpoint == "asset"  # a script tag sends no token
        if not is_public and not hmac.compare_digest(given, token.encode()):
            raise Refused(401, "the token is missing, or another")

    @app.after_request
    def headers(response):
        response.headers.update(HEADERS)
        return response

    return app


def survey_app(survey, guidelines="", token=""):
    """The app of the page on which people answer a Survey's questions."""
    app = make_app("judge.html", token)
    from flask import request

    @app.get("/api/next")
    def next_question():
        task, progress = survey.next(labeler_name(request.args.get("labeler")))
        if task is None:
            return {"done": True, "progress": progress}, 404
        reply = {"id": task.id, "kind": survey.kind, "responses": task.responses}
        reply |= task.question.prompt_record | {"progress": progress, "guidelines": guidelines}
        return reply | ({"repeat_of": task.repeat_of} if task.repeat_of else {})

    @app.post("/api/answer")
    def answer():
        body = json_body(request)
        if not isinstance(body.get("id"), str) or "answer" not in body:
            raise Refused(400, "needs id, labeler and answer")
        survey.answer(labeler_name(body.get("labeler")), body["id"], body["answer"])
        return {"saved": body["id"]}

    @app.post("/api/undo")
    def undo():
        return {"undone": survey.undo(labeler_name(json_body(request).get("labeler")))}

    return app


def json_body(request):
    body = request.get_json()  # 400 where it is no JSON, 415 where it does not say that it is
    if not isinstance(body, dict):
        raise Refused(400, "an object is needed")
    return body


def labeler_name(name):
    """A labeler's name as it is kept: however it was typed, the same letters are the same name."""
    name = unicodedata.normalize("NFC", name).strip() if isinstance(name, str) else ""
    if not 0 < len(name) <= LONGEST_NAME or {unicodedata.category(c) for c in name} & {"Cc", "Cs"}:
        raise Refused(400, f"labeler must be a name of at most {LONGEST_NAME} characters")
    return name


def listen(make, host, port):
    """(server, its address) for make(token=...), an app; it answers once its run() is called. Off
    the loopback a token is made."""
    import waitress

    host = "127.0.0.1" if host == "localhost" else host  # one address, not two
    token = "" if is_loopback(host) else secrets.token_urlsafe(16)
    app = make(token=token)
    options = {"threads": 8, "ident": None}
    options["max_request_body_size"] = app.config["MAX_CONTENT_LENGTH"] + 1
    try:
        server = waitress.create_server(app, host=host, port=port, **options)
    except (OSError, ValueError) as error:
        die(f"--host {host} --port {port}: {reason(error)}; --port 0 takes a free one")
    name = f"[{host}]" if ":" in host else host
    query = f"?token={token}" if token else ""
    return server, f"http://{name}:{server.effective_port}/{query}"
