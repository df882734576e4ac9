"""The browser without a browser: who is answered, what is written as files, the command, and a real store's pages."""

from __future__ import annotations

import html.parser
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from browse_stub import Atlas, Live, Served

from writesae.browse import Atlas as RealAtlas
from writesae.browse import link, sample_store
from writesae.browse.columns import Columns
from writesae.browse.guard import POLICY, Guard
from writesae.browse.pages import Missing, Pages
from writesae.browse.static_site import chosen, write

pytest.importorskip("starlette", reason="starlette is not installed: pip install writesae[browse]")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install writesae[browse]")


@pytest.fixture(scope="module")
def served():
    made = Served(Atlas(live=Live(0.005)))
    yield made
    made.close()


def asked(served, method="GET", path="/", body=None, **headers):
    """(status, headers, body) of a request that no browser would let a page make."""
    connection = http.client.HTTPConnection("127.0.0.1", served.listening.getsockname()[1], timeout=10)
    connection.putrequest(method, path, skip_host="host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("content-length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_strangers_are_refused(served):
    host = f"127.0.0.1:{served.listening.getsockname()[1]}"
    for path in ("/", "/5/3/1258", "/about", "/data/table.json", "/assets/list.js", "/nothing", "/5/3/99999"):
        status, headers, _ = asked(served, path=path)
        assert POLICY in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff", path
        assert "unsafe" not in headers["content-security-policy"] and status in (200, 404)
    assert asked(served, host="attacker.example")[0] == 421 == asked(served, host="")[0]
    assert asked(served, host="localhost:1")[0] == asked(served, host="[::1]:1")[0] == 200
    for path in (
        "/assets/../app.py",
        "/assets/..%2fapp.py",
        "/data/../app.py",
        "/assets/%2e%2e/app.py",
        "/data/linked.bin",
    ):
        assert asked(served, path=path)[0] == 404
    ours = {"host": host, "origin": f"http://{host}", "content_type": "application/json"}
    question = b'{"text": "a b"}'
    assert asked(served, "POST", "/api/text", question, **ours)[0] == 200
    for change in ({"origin": "http://attacker.example"}, {"origin": "null"}, {"origin": f"http://{host}.attacker.example"},
                   {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"}):  # fmt: skip
        assert asked(served, "POST", "/api/text", question, **{**ours, **change})[0] == 403, change
    assert asked(served, "POST", "/api/text", question, host=host, content_type="application/json")[0] == 403
    assert asked(served, "POST", "/api/text", question, **{**ours, "content_type": "text/plain"})[0] == 415
    assert asked(served, "PUT", "/api/text", question, **ours)[0] == 405 == asked(served, path="/api/text")[0]
    refused = [(b"[1]", b"list"), (b"{", b"expected JSON"), (b"[" * 100_000, b"JSON"), (b"x" * 300_000, b"most"),
               (b'{"text": 3}', b"text: expected text"), (b'{"text": "", "sites": [["x", 1]]}', b"sites")]  # fmt: skip
    for body, told in refused:
        status, _, answer = asked(served, "POST", "/api/text", body, **ours)
        assert status == 400 and told in answer, answer
    for edit in (
        "{}",
        '{"kind": "erase", "layer": -1}',
        '{"kind": "scale", "layer": 5, "head": 3, "feature": 1, "factor": NaN}',
    ):
        body = b'{"prompt": "a", "edits": [' + edit.encode() + b"]}"
        assert asked(served, "POST", "/api/compare", body, **ours)[0] == 400


def test_others_may_come_by_address_or_our_name_alone():
    guard = Guard(None, "0.0.0.0")
    wanted = {"192.168.1.7:8077": True, "[fe80::1]:80": True, socket.gethostname(): True, "attacker.example": False}
    for host, answered in wanted.items():
        assert (guard.refuses("GET", {b"host": host}) is None) == answered, host
    assert Guard(None).refuses("GET", {b"host": "192.168.1.7:8077"})[0] == 421


def test_files_go_on_where_they_were_and_mix_with_nothing(tmp_path, monkeypatch):
    from writesae.browse import static_site

    atlas, out = Atlas(features=10), tmp_path / "site"
    plain, asked = static_site._page, []

    def stopping(pages, row):
        asked.append(row)
        if len(asked) == 9:  # some are made beforehand, to say how large all will be
            os.kill(os.getpid(), signal.SIGINT)
        return plain(pages, row)

    monkeypatch.setattr(static_site, "_page", stopping)
    assert write(atlas, out) == 130
    made = sorted(out.glob("L*/*.html"))
    assert 0 < len(made) < len(chosen(atlas.table, None))
    monkeypatch.setattr(static_site, "_page", plain)
    before = {x: x.stat().st_mtime_ns for x in made}
    assert write(atlas, out) == 0
    assert len(list(out.glob("L*/*.html"))) == len(chosen(atlas.table, None))
    assert {x: x.stat().st_mtime_ns for x in made} == before
    with pytest.raises(ValueError, match="static: .* another store, version or choice"):
        write(Atlas(features=10, seed=1), out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match="static: expected a new or empty folder.*thesis.tex"):
        write(atlas, tmp_path / "mine")


def test_columns_find_rows(served):
    columns = Columns(served.atlas)
    assert [columns.find(5, h, f) for h, f in ((0, 0), (1, 5), (3, 2047))] == [0, 2053, 6143]
    assert columns.find(5, 3, 2048) is None and columns.find(5, 2, 0) is None and columns.find(5, 3, -1) is None
    assert columns.of_site(5, 1) == (2048, 4096) and columns.of_site(9, 9) == (0, 0)
    with pytest.raises(KeyError):
        columns.file("../table.json")


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    store, _ = sample_store(tmp_path, F=16, firings=2000, k=4, dictionaries=False)
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "writesae", "browse", str(store), "--port", "0"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            line = child.stdout.readline()
            url = re.fullmatch(r"(http://127\.0\.0\.1:(\d+)/)  \(Ctrl-C ends it\)\n", line)
            assert url, line or child.stderr.read()
            connection = http.client.HTTPConnection("127.0.0.1", int(url[2]), timeout=20)
            connection.request("GET", "/0/0/3")
            assert b"L0H0/3" in connection.getresponse().read()
            child.send_signal(signal.SIGINT)
            _, told = child.communicate(timeout=20)
        finally:
            child.kill()
    assert child.returncode == 0 and "Traceback" not in told


@pytest.mark.parametrize(
    "options, told",
    [
        (["--features", "3"], "features: expected together with --static"),
        (["--static", "x", "--open"], "static: files are written and nothing is served"),
        (["--static", "x", "--model", "default"], "static: files cannot run a model"),
        (["--static", "x", "--features", "0"], "features: expected an integer >= 1, got 0"),
        (["--host", "203.0.113.9"], "port: 203.0.113.9:"),
        ([], "no-such-store"),
    ],
)
def test_the_command_refuses_in_one_line(options, told, capsys, tmp_path, monkeypatch):
    from writesae import cli

    monkeypatch.chdir(tmp_path)
    assert cli.main(["browse", "no-such-store", *options]) == 2
    out, err = capsys.readouterr()
    assert told in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_links_keep():
    assert link(5, 3, 1258) == "5/3/1258" and link(5, 3, 1258, static=True) == "L5H3/1258.html"
    with pytest.raises(ValueError, match="feature: expected an integer >= 0, got -1"):
        link(5, 3, -1)


class Tags(html.parser.HTMLParser):
    """What would run on a page: names of its scripts, and tags and attributes that no page of ours has."""

    def __init__(self):
        super().__init__()
        self.scripts, self.bad = set(), []

    def handle_starttag(self, tag, attributes):
        source = dict(attributes).get("src") or ""
        if tag == "script" and re.fullmatch(r"(?:\.\.?/)+assets/\w+\.js", source):
            self.scripts.add(Path(source).stem)
        elif tag in ("script", "img", "iframe", "object", "embed", "base", "style"):
            self.bad.append(tag)
        self.bad += [name for name, _ in attributes if name.startswith("on") or name in ("style", "srcdoc")]


def test_a_real_store_becomes_pages(tmp_path):
    """`Atlas` and the pages together: every feature of a small store, its dictionaries and its text, all hostile."""
    store, dictionaries = sample_store(tmp_path, F=24, firings=4000, k=4, hostile=True)
    pages = Pages(RealAtlas.open(store, sae=dictionaries, progress=False))
    made = [pages.feature(layer, 0, i) for layer in (0, 1) for i in range(24)] + [pages.index, pages.about()]
    for text in made:
        found = Tags()
        found.feed(text)
        assert found.scripts <= {"theme", "common", "feature", "table", "list"} and not found.bad
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert "Nearest atoms" in made[3] and 'class="a10 here"' in made[3] and "Fires together with" in made[3]
    with pytest.raises(Missing):
        pages.feature(0, 0, 24)
