"""web.py: who may ask and answer, what comes back, and that nothing said is lost on the way."""

import json
import random
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("flask", reason="pip install -e '.[human]'")

from nanorlhf.data.examples import load_feedback  # noqa: E402
from nanorlhf.human import web  # noqa: E402
from tests.human.conftest import call, records  # noqa: E402


@pytest.fixture
def client(survey):
    d = survey()
    found = web.survey_app(d, "be kind").test_client()
    found.survey = d
    return found


@pytest.fixture
def running(survey):
    """running(kind, ...) -> (address of a server, its Survey)."""

    def start(*args, **kwargs):
        d = survey(*args, **kwargs)
        server, address = web.listen(web.survey_app(d), "127.0.0.1", 0)
        Thread(target=server.run, daemon=True).start()
        return address, d

    return start


def ask(client, name="ann"):
    return client.get("/api/next", query_string={"labeler": name}).json


def test_a_question_is_asked_until_it_is_answered_and_then_the_next(client):
    first = ask(client)
    assert first == ask(client) and first["kind"] == "comparisons"
    assert first["prompt"].startswith("Question") and len(first["responses"]) == 2
    assert first["guidelines"] == "be kind" and first["progress"] == {"answered": 0, "total": 24}
    said = {"id": first["id"], "labeler": "ann", "answer": 1}
    assert client.post("/api/answer", json=said).status_code == 200
    twice = client.post("/api/answer", json=said | {"answer": 0})
    assert twice.status_code == 409 and "undo" in twice.json["error"]
    assert ask(client)["id"] != first["id"] and ask(client, "bob")["progress"]["answered"] == 0
    undone = {"undone": first["id"], "answer": "reply 2 is better"}
    assert client.post("/api/undo", json={"labeler": "ann"}).json == undone
    assert ask(client) == first
    assert client.post("/api/answer", json=said | {"answer": 0}).status_code == 200
    _, (example,) = load_feedback([client.survey.journal.path])
    assert example.target == [1, 2] and example.completions == first["responses"]


def test_nothing_tells_which_model_wrote_what(survey):
    client = web.survey_app(survey(models=("out/secret_a", "out/secret_b"))).test_client()
    assert "secret" not in json.dumps(ask(client))


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:99", "127.9.9.9"])
def test_this_machine_by_any_name_may_ask(client, host):
    assert client.get("/api/next?labeler=a", headers={"Host": host}).status_code == 200
    origin = {"Host": host, "Origin": f"http://{host}"}
    assert client.get("/api/next?labeler=a", headers=origin).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "192.168.0.7:8000"},
        {"Host": "127.0.0.1:8000", "Origin": "http://evil.example"},
        {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:9999"},
        {"Host": "127.0.0.1:8000", "Origin": "null"},
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/next?labeler=ann", "/api/undo", "/nowhere"])
def test_a_foreign_page_may_not(client, headers, path):
    found = client.post(path, json={"labeler": "ann"}, headers=headers)
    assert found.status_code == client.get(path, headers=headers).status_code == 403


def test_beyond_this_machine_a_token_is_needed(survey):
    app = web.survey_app(survey())
    app.config["TOKEN"] = "öpen"
    client = app.test_client()
    for query in ({}, {"token": "wrong"}):
        assert client.get("/", query_string=query).status_code == 401
    assert client.get("/", query_string={"token": "öpen"}).status_code == 200
    at = {"query_string": {"token": "öpen"}, "headers": {"Host": "192.168.0.7:8000"}}
    assert client.get("/", **at).status_code == 200
    at["headers"]["Origin"] = "http://evil.example"
    assert client.get("/", **at).status_code == 403


def test_a_token_is_made_where_none_is_given(survey):
    app, addresses = web.survey_app(survey()), []
    for host in ("0.0.0.0", "0.0.0.0", "localhost"):
        server, address = web.listen(app, host, 0, "ann b")
        server.close()
        addresses.append(address)
    token, another = (a.partition("?token=")[2].partition("&")[0] for a in addresses[:2])
    assert len(token) >= 20 and token != another
    assert addresses[0].endswith("&labeler=ann+b")
    assert re.fullmatch(r"http://127.0.0.1:\d+/\?labeler=ann\+b", addresses[2])


def test_a_proxy_is_let_in_by_its_name_and_with_the_token(survey):
    """As Colab (this machine as Host) and tunnels (the public name as Host) call a page."""
    client = web.survey_app(survey()).test_client()
    public = {"Host": "mine.example", "Origin": "https://mine.example"}
    proxied = {"Host": "localhost:8000", "Origin": "https://mine.example"}
    for headers in (public, proxied):
        refusal = client.get("/", headers=headers)
        assert refusal.status_code == 403 and "--allow_host mine.example" in refusal.json["error"]
    for name in ("mine.example", "https://Mine.example/"):
        server, address = web.listen(client.application, "127.0.0.1", 0, allow_host=[name])
        server.close()
        token = {"token": address.partition("?token=")[2]}
        for headers in (public, proxied, {"Host": "localhost:8000"}):
            assert client.get("/", headers=headers).status_code == 401
            assert client.get("/", headers=headers, query_string=token).status_code == 200
        for origin in ("https://evil.example", "https://mine.example.evil.example"):
            headers = proxied | {"Origin": origin}
            assert client.get("/", headers=headers, query_string=token).status_code == 403


def test_the_page_runs_its_own_scripts_and_no_other(client):
    page = client.get("/")
    policy = page.headers["Content-Security-Policy"]
    assert policy == "default-src 'self'; img-src data:; frame-ancestors 'none'"
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.get_data(as_text=True))
    assert sources == ["data:,", "style.css", "common.js", "judge.js"]
    for name in sources[1:]:
        assert client.get(f"/{name}").status_code == 200
    for name in ("..%2fweb.py", "../web.py", "web.py", "nowhere"):
        assert client.get(f"/{name}").status_code == 404


def test_no_text_can_become_markup():
    for path in web.STATIC.iterdir():
        text = path.read_text()
        for markup in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert markup not in text
        assert not any(f"{scheme}//" in text for scheme in ("http:", "https:"))


BAD = [
    ("/api/answer", b"", 400),
    ("/api/answer", b"[" * 300_000, 413),
    ("/api/answer", b"[" * 20_000, 400),
    ("/api/answer", b"[1]", 400),
    ("/api/answer", b'{"id": 1, "labeler": "ann", "answer": 0}', 400),
    ("/api/answer", b'{"id": "\\ud800", "labeler": "ann", "answer": 0}', 400),
    ("/api/answer", b'{"id": "x", "labeler": "ann"}', 400),
    ("/api/answer", b'{"id": "x", "labeler": {}, "answer": 0}', 400),
    ("/api/answer", b"\xff\xfe", 400),
    ("/api/undo", b"{}", 400),
]


@pytest.mark.parametrize("path, body, status", BAD, ids=range(len(BAD)))
def test_what_cannot_be_read_is_said_to_be_so(client, path, body, status):
    found = client.post(path, data=body, content_type="application/json")
    assert found.status_code == status and found.json["error"]
    assert client.survey.journal.path.read_text() == ""


def test_a_form_of_another_site_is_no_answer(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.post("/api/undo", data=b"{}", content_type=kind).status_code == 415
    assert client.get("/api/next").status_code == 400
    assert client.get("/api/answer").status_code == 405


def test_a_name_is_the_same_however_its_letters_are_made(client):
    first = ask(client, "Zoe\u0308")
    assert first == ask(client, " Zo\u00eb ")
    for name in ("\u0915\u094d\u200d\u0937", "\U0001f469\u200d\U0001f52c"):  # with joiners
        assert "id" in ask(client, name)
    for name in ("", "  ", "a\nb", "\x7f", "a" * 65):
        assert client.get("/api/next", query_string={"labeler": name}).status_code == 400


def raw_reply(address, raw):
    """What a server answers to bytes."""
    port = int(address.split(":")[2].strip("/"))
    with socket.create_connection(("127.0.0.1", port), timeout=20) as s:
        s.sendall(raw)
        s.shutdown(socket.SHUT_WR)
        try:
            return s.recv(100)
        except ConnectionResetError:
            return b""


def test_a_body_that_is_too_large_is_not_taken_in(running):
    """By the server in front, before anybody looks at who sends it."""
    head = b"POST /api/answer HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 300000000\r\n\r\n"
    assert raw_reply(running()[0], head).startswith(b"HTTP/1.1 413")


def test_two_tabs_and_eight_threads_give_each_answer_once(running):
    address, d = running(n=30, repeat=0.2)
    total = d.next("ann")[1]["total"]

    def tab(i):
        rng, wins = random.Random(i), 0
        while True:
            asked = call(f"{address}api/next?labeler=ann")
            if asked.get("done"):
                return wins
            said = {"id": asked["id"], "labeler": "ann", "answer": rng.choice([0, 1, -1])}
            wins += post(f"{address}api/answer", said) == 200

    with ThreadPoolExecutor(8) as pool:
        wins = sum(pool.map(tab, range(8)))
    ids = [r["judgement_id"] for r in records(d.journal.path)]
    assert wins == len(ids) == len(set(ids)) == total


def post(url, body):
    """The status of the answer."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        return urlopen(request).status
    except HTTPError as error:
        return error.code


def test_thousands_of_malformed_requests_break_nothing(running):
    """Raw bytes at a real server: no 500, no lost answer, and it still answers."""
    address, d = running()
    first, rng, statuses = d.next("ann")[0].id, random.Random(1), set()
    post(f"{address}api/answer", {"id": first, "labeler": "ann", "answer": 1})
    before = d.journal.path.read_bytes()
    good = b"POST /api/answer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    bodies = [b'{"id": "x", "labeler": "ann", "answer": 0}', b"{", b"\x00" * 30, b"[[[["]
    for _ in range(5_000):
        body = rng.choice(bodies)
        raw = bytearray(good + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        for _cut in range(rng.randint(1, 6)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 4))
        head = raw_reply(address, bytes(raw))
        if head.startswith(b"HTTP/1"):
            statuses.add(int(head.split()[1]))
    assert not [x for x in statuses if x >= 500 and x not in (501, 505)], statuses
    assert 400 in statuses and d.journal.path.read_bytes() == before
    assert call(f"{address}api/next?labeler=ann")["id"] != first
