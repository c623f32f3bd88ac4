"""The server behind a page: who may call it, and the routes of judging.

    GET  /api/next?labeler=NAME    gives {"id", "kind", "prompt" or "messages", "responses"}
    POST /api/answer               takes {"id", "labeler", "answer"}
    POST /api/undo                 takes {"labeler"}; gives {"undone": id, "answer": in words}

An error is {"error": why}. On the loopback a request must name this machine as its Host and, where
a browser says which page sends it, this page as its Origin: then no other page can read or answer,
not even one whose name was pointed to this machine (DNS rebinding). Elsewhere a token is needed,
and where a proxy shows the page under another name, which --allow_host gives.
"""

import re
import secrets
import unicodedata
from pathlib import Path
from urllib.parse import urlencode

from nanorlhf.config import die, package, reason
from nanorlhf.human.journal import Refused

STATIC = Path(__file__).with_name("static")
LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[?::1\]?)(:\d+)?", re.IGNORECASE)
LARGEST_BODY = 2**18  # bytes of a request, which may hold a conversation
HEADERS = {
    # nothing from elsewhere, no script but our own, and no page around this one
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # a referrer would show the token
    "Cache-Control": "no-store",
}


def check_packages():
    """Exits 2 where the extra is missing: asked before models answer, which takes minutes."""
    for name in ("flask", "waitress"):
        package(name, "the page", "human")


def make_app(page):
    """A Flask app that shows a page of STATIC to whoever may see it: on the loopback to this
    machine's own pages, elsewhere to those who have the token that `listen` sets."""
    flask = package("flask", "the page", "human")  # here, as it is an extra
    from werkzeug.exceptions import HTTPException

    app = flask.Flask("nanorlhf", static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=LARGEST_BODY, TOKEN="", HOSTS=())
    app.register_error_handler(Refused, lambda e: ({"error": str(e)}, e.status))
    app.register_error_handler(HTTPException, lambda e: ({"error": e.description}, e.code))
    app.register_error_handler(RecursionError, lambda e: ({"error": "nested too deeply"}, 400))
    app.after_request(lambda response: response.headers.update(HEADERS) or response)

    @app.get("/", endpoint="page")
    @app.get("/<name>", endpoint="asset")
    def file(name=page):
        return flask.send_from_directory(STATIC, name)

    @app.before_request
    def guard():
        request, token = flask.request, app.config["TOKEN"]
        host = request.headers.get("Host", "")
        origin = request.headers.get("Origin", f"http://{host}").partition("://")[2]
        is_foreign = origin.lower() not in (host.lower(), *app.config["HOSTS"])
        if is_foreign or not (token or LOOPBACK.fullmatch(host)):
            name = origin if is_foreign else host
            raise Refused(403, f"a foreign Host or Origin; --allow_host {name} is for your own")
        is_shown = secrets.compare_digest(request.args.get("token", "").encode(), token.encode())
        if token and not is_shown and request.endpoint != "asset":  # a script tag sends no token
            raise Refused(401, "the token is missing, or another")

    return app


def survey_app(survey, guidelines=""):
    """The app of the page on which people answer a Survey's questions."""
    app = make_app("judge.html")
    from flask import request

    @app.get("/api/next")
    def next_question():
        task, progress = survey.next(labeler_of(request.args))
        if task is None:
            return {"done": True, "progress": progress}, 404
        prompt = {"prompt" if isinstance(task.prompt, str) else "messages": task.prompt}
        reply = {"id": task.id, "kind": survey.kind, "responses": task.responses} | prompt
        return reply | {"progress": progress, "guidelines": guidelines}

    @app.post("/api/answer")
    def answer():
        body = json_body(request)
        id = str(body.get("id"))
        survey.answer(labeler_of(body), id, body.get("answer", "none"))
        return {"saved": id}

    @app.post("/api/undo")
    def undo():
        id, words = survey.undo(labeler_of(json_body(request)))
        return {"undone": id, "answer": words}

    return app


def json_body(request):
    body = request.get_json()  # 400 where it is no JSON, 415 where it does not say that it is
    return body if isinstance(body, dict) else {}


def labeler_of(body):
    """A labeler's name as it is kept: however it was typed, the same letters are the same name."""
    name = unicodedata.normalize("NFC", str(body.get("labeler") or "")).strip()
    if not re.fullmatch(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,64}", name):
        raise Refused(400, "labeler must be a name of at most 64 characters")
    return name


def listen(app, host, port, labeler="", allow_host=()):
    """(server, its address) for an app; it answers once its run() is called. Off the loopback, and
    where a proxy calls it by a name of `allow_host`, a token is made. `labeler`: whom the address
    is for."""
    waitress = package("waitress", "the page", "human")
    host = "127.0.0.1" if host == "localhost" else host  # one address, not two
    app.config["HOSTS"] = [re.sub(r"^\w+://|/.*", "", name).lower() for name in allow_host]
    is_closed = LOOPBACK.fullmatch(host) and not allow_host
    app.config["TOKEN"] = "" if is_closed else secrets.token_urlsafe(16)
    options = {"threads": 8, "max_request_body_size": LARGEST_BODY + 1}
    try:
        server = waitress.create_server(app, host=host, port=port, **options)
    except (OSError, ValueError) as error:
        die(f"--host {host} --port {port}: {reason(error)}; --port 0 takes a free one")
    name = f"[{host}]" if ":" in host else host
    query = {"token": app.config["TOKEN"], "labeler": labeler}
    query = "&".join(urlencode({key: value}) for key, value in query.items() if value)
    return server, f"http://{name}:{server.effective_port}/" + ("?" + query if query else "")
