"""The page of tools/merge.py --serve: its recipes, who may ask, the process of a merge, and the page in a browser."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.merging.browser import PROGRAM, Browser
from tests.merging.conftest import tensors_of
from tests.merging.test_tools import TOOLS, call
from trinity.errors import UserError
from trinity.merging.methods import METHODS
from trinity.merging.recipe import read_recipe
from trinity.reporting.merge_server.form import (
    MARK,
    command_words,
    methods_for_page,
    recipe_file,
    recipe_of,
    recipe_text,
)
from trinity.reporting.merge_server.job import MergeJob, last_text
from trinity.reporting.merge_server.server import MergeApp, make_server

pytest.importorskip("werkzeug", reason='needs pip install "trinity-moe[serve]"')
ROOT = TOOLS.parent

FIELDS = {
    "weight": ("0.5", 0.5), "density": ("[0.2, 0.8]", [0.2, 0.8]), "epsilon": ("0.1", 0.1), "gamma": ("0.02", 0.02),
    "scale": ("2", 2), "normalize": ("false", False), "lambda": ("0.7", 0.7), "rescale": ("density", "density"),
    "t": ("[{filter: mlp, value: 0.3}, {value: 0.5}]", [{"filter": "mlp", "value": 0.3}, {"value": 0.5}]),
    "nuslerp_flatten": ("true", True), "nuslerp_row_wise": ("false", False), "normalize_weights": ("true", True),
    "eps": ("0.001", 0.001), "max_iter": ("3", 3), "tol": ("0.01", 0.01), "select_topk": ("0.5", 0.5),
    "filter_wise": ("true", True), "r": ("0.2", 0.2), "alpha": ("0.3", 0.3),
}  # fmt: skip
"""Parameter → what is typed, and what a recipe has for it."""
EXPECTED = {
    "linear": ("weight", "normalize"),
    "slerp": ("", "t"),
    "nuslerp": ("weight", "nuslerp_flatten nuslerp_row_wise"),
    "multislerp": ("weight", "normalize_weights eps"),
    "karcher": ("", "max_iter tol"),
    "task_arithmetic": ("weight", "normalize lambda"),
    "ties": ("weight density", "normalize lambda"),
    "dare_linear": ("weight density", "normalize lambda rescale"),
    "dare_ties": ("weight density", "normalize lambda rescale"),
    "della": ("weight density epsilon", "normalize lambda rescale"),
    "della_linear": ("weight density epsilon", "normalize lambda rescale"),
    "breadcrumbs": ("weight density gamma", "normalize lambda"),
    "breadcrumbs_ties": ("weight density gamma", "normalize lambda"),
    "sce": ("", "select_topk"),
    "model_stock": ("", "filter_wise"),
    "nearswap": ("", "t"),
    "arcee_fusion": ("", ""),
    "ram": ("", "epsilon"),
    "ramplus_tl": ("", "epsilon r alpha"),
    "passthrough": ("scale", ""),
}
"""Method → its parameters by model, and of the whole, after the table of trinity/merging/README.md."""
TIES = {
    "by": "form", "method": "ties", "base_model": "base", "out_dir": "out",
    "models": [{"model": name, "parameters": {"weight": "0.5", "density": "0.6"}} for name in "ab"],
}  # fmt: skip
SLOW = """
import sys, time
from tqdm import tqdm
print("note: one", file=sys.stderr)
try:
    for _ in tqdm(range(100), desc="merging", initial=40, file=sys.stderr):
        time.sleep(600)
except KeyboardInterrupt:
    open("interrupted", "w").close()
    sys.exit(130)
"""
"""A merge that stands at 40 % until it is interrupted."""


@pytest.fixture
def app(family: Path) -> Iterator[MergeApp]:
    """The application with the real program and its dry run, in the models' folder."""
    spec = importlib.util.spec_from_file_location("merge_tool", TOOLS / "merge.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    app = MergeApp(str(TOOLS / "merge.py"), lambda words: tool.dry_run(tool.parse(words)))
    yield app
    app.job.stop()


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program SLOW, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path / "slow.py"


def ask(app: MergeApp, method: str, address: str, form: Any = None, **headers: str) -> Any:
    """A request with host and token, unless `headers` say otherwise; (code, JSON or text)."""
    from werkzeug.test import Client

    given = {"Host": "127.0.0.1:8765", "X-Token": app.token} | {k.replace("_", "-"): v for k, v in headers.items()}
    answer = Client(app).open(address, method=method, headers=given, **({} if form is None else {"json": form}))
    return answer.status_code, answer.json if answer.is_json else answer.text


def started(job: MergeJob) -> None:
    """Wait for the bar of SLOW."""
    while "40%" not in job.status()["bar"]:
        assert job.running, job.status()
        time.sleep(0.02)


@pytest.mark.parametrize("method", METHODS)
def test_form_makes_the_recipe(method: str, tmp_path: Path) -> None:
    """All fields are filled, also those of other methods, which do not count; then none, which leaves the defaults."""
    per_model, whole = (names.split() for names in EXPECTED[method])
    typed = {name: text for name, (text, _) in FIELDS.items()}
    count = max(METHODS[method].models[0], 1)
    models = [{"model": name, "parameters": typed} for name in "ab"[:count]]
    form = {"method": method, "base_model": " base ", "models": [*models, {"model": " ", "parameters": typed}]}
    read = {name: value for name, (_, value) in FIELDS.items()}
    own = {"parameters": {name: read[name] for name in per_model}} if per_model else {}
    expected = {"merge_method": method, "base_model": "base", "models": [{"model": n} | own for n in "ab"[:count]]}
    expected |= {"parameters": {name: read[name] for name in whole}} if whole else {}
    more = {"out_dtype": "bfloat16", "tokenizer": "union", "match_experts": True}
    assert recipe_of(form | {"parameters": typed}) == expected
    assert recipe_of(form | {"parameters": typed} | more) == expected | more | {"tokenizer": {"source": "union"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(form | {"parameters": typed}))
    assert yaml.safe_load(path.read_text()) == expected
    assert read_recipe(path).models == [*"ab"[:count], "base"]
    bare = {"method": method, "models": [{"model": "a", "parameters": dict.fromkeys(typed, "")}], "parameters": {}}
    missing = {"weight", "t"} & {*per_model, *whole}
    if missing:
        with pytest.raises(UserError, match=f"{missing.pop()} of (model 1|{method}) has no default; fill it in"):
            recipe_of(bare)
    else:
        assert recipe_of(bare) == {"merge_method": method, "models": [{"model": "a"}]}


def test_methods_for_page() -> None:
    """Every method with a summary, and its parameters with default and bounds in words."""
    methods = {method["name"]: method for method in methods_for_page()}
    assert list(methods) == list(METHODS)
    assert all(method["summary"] and "`" not in method["summary"] for method in methods.values())
    assert methods["ties"]["per_model"] == [
        {"name": "weight", "kind": "number", "hint": "", "default": None},
        {"name": "density", "kind": "number", "hint": "0 to 1", "default": "1"},
    ]
    assert methods["karcher"]["whole"] == [
        {"name": "max_iter", "kind": "number", "hint": "whole number, at least 1", "default": "10"},
        {"name": "tol", "kind": "number", "hint": "at least 0", "default": "1e-05"},
    ]
    rescale = methods["dare_ties"]["whole"][2]
    words = ["true", "false", "l1", "density"]
    assert rescale == {"name": "rescale", "kind": "choice", "words": words, "default": "l1"}


def test_pasted_recipe_is_kept() -> None:
    """Its text is written as it is, below the page's mark, which is written once."""
    text = "  models: # mine\n  - model: a"
    assert recipe_text({"by": "yaml", "yaml": text}) == f"{MARK}\n{text}\n"
    assert recipe_text({"by": "yaml", "yaml": f"{MARK}\n{text}"}) == f"{MARK}\n{text}\n"


def test_command_line() -> None:
    """Every field becomes its option; what an option would be taken for is refused."""
    form = TIES | {
        "workers": "2", "overwrite": True, "report": "r.html", "validation": "code=a b\n\n x=y ", "recalibrate": "t",
        "window": "64", "rows": "5",
    }  # fmt: skip
    assert command_words(form, Path("r.yaml")) == [
        "r.yaml", "out", "--overwrite", "--workers", "2", "--report", "r.html", "--validation", "code=a b", "x=y",
        "--recalibrate", "t", "--window", "64", "--rows", "5",
    ]  # fmt: skip
    assert command_words(TIES, Path("r.yaml")) == ["r.yaml", "out"]
    words = command_words({"out_dir": "--overwrite", "report": "-h.html"}, recipe_file({"out_dir": "./--overwrite"}))
    assert words == ["./--overwrite.yaml", "./--overwrite", "--report", "./-h.html"]
    for field in ("validation", "recalibrate"):
        with pytest.raises(UserError, match=r"write another name, or \./--overwrite"):
            command_words(form | {field: "--overwrite"}, Path("r.yaml"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"models": []}, "there is no model"),
        ({"method": "tis"}, "merge_method 'tis' is not known"),
        ({"out_dir": " "}, "there is no output folder"),
        (
            {"out_dir": "a"},
            'or merge; give another folder, or tick "Replace an earlier merge or export in this folder"',
        ),
        ({"base_model": ""}, "ties needs a base_model"),
        ({"base_model": "nowhere"}, "nowhere"),
        ({"models": [{"model": "a", "parameters": {"weight": "1", "density": "2"}}]}, "it must be between 0 and 1"),
        ({"models": [{"model": "a", "parameters": {"weight": "[1"}}]}, "weight of model 1 is [1; write a number"),
        ({"by": "yaml", "yaml": "models: ["}, "the recipe is not YAML"),
        ({"by": "yaml"}, "there is no recipe"),
        ({"workers": "x"}, "--workers: invalid int value: 'x'"),
        ({"workers": "--overwrite"}, "--workers: expected one argument"),
        ({"out_dir": "~nobody_has_this_name/out"}, "is not a user's home folder"),
        ({"report": "out.txt"}, "must end in .html"),
        ({"validation": "x"}, "write --validation NAME=TEXT"),
        ({"out_dir": "taken"}, "taken.yaml exists and was not written by this page"),
    ],
)
def test_check_refuses(app: MergeApp, family: Path, changes: dict, sentence: str) -> None:
    """In the sentence of the command line, and nothing is written."""
    (family / "taken.yaml").write_text("mine")
    before = sorted(family.iterdir())
    for address in ("/check", "/merge"):
        code, answer = ask(app, "POST", address, TIES | changes)
        assert code == 400
        assert sentence in answer["error"]
        assert "\n" not in answer["error"]
        assert sorted(family.iterdir()) == before


def test_check_is_the_dry_run(app: MergeApp, family: Path, capsys: pytest.CaptureFixture) -> None:
    """The same lines but for the memory of Python, which differs from process to process; nothing is written."""
    before = sorted(family.iterdir())
    code, answer = ask(app, "POST", "/check", TIES)
    assert code == 200
    assert sorted(family.iterdir()) == before
    (family / "recipe.yaml").write_text(answer["recipe"])
    assert call("merge.py", "recipe.yaml", "out", "--dry-run") == 0
    lines = [text.strip().splitlines() for text in (answer["plan"], capsys.readouterr().out)]
    kept = [[line for line in each if not line.startswith("memory:")] for each in lines]
    assert kept[0] == kept[1]
    assert len(kept[0]) == len(lines[0]) - 1 >= 6


@pytest.mark.processes  # the package starts them
def test_merge_gives_the_bytes_of_the_command(app: MergeApp, family: Path, capsys: pytest.CaptureFixture) -> None:
    """And its last line; the page shows the command, which gives the same folder again, and serves the report."""
    pytest.importorskip("plotly", reason='needs pip install "trinity-moe[report]"')
    code, answer = ask(app, "POST", "/merge", TIES | {"report": "out.html"})
    assert (code, answer["state"]) == (200, "running")
    code, answer = ask(app, "POST", "/merge", TIES)
    assert (code, answer["error"]) == (400, "a merge is running; wait for it, or cancel it")
    assert ask(app, "GET", "/report")[0] == 404
    app.job.wait()
    _, status = ask(app, "GET", "/status")
    assert status["state"] == "finished", status
    assert status["form"] == TIES | {"report": "out.html"}
    count = len(tensors_of(family / "base"))
    assert status["lines"][-1] == f"{3 * count} tensors read, {count} written, 0 dropped"
    python, program, recipe, out, *options = status["command"].split()
    assert (python, Path(program), out, options) == ("python", TOOLS / "merge.py", "out", ["--report", "out.html"])
    assert call("merge.py", recipe, "again") == 0
    assert capsys.readouterr().out.splitlines()[-1] == status["lines"][-1]
    files = {path.name for path in (family / "out").iterdir()}
    assert files == {path.name for path in (family / "again").iterdir()}
    for name in files:
        assert (family / "out" / name).read_bytes() == (family / "again" / name).read_bytes(), name
    assert ask(app, "GET", "/report") == (200, (family / "out.html").read_text())
    assert recipe_file(TIES) == Path("out.yaml")  # the page's own file may be replaced


def test_only_this_start_and_this_host(app: MergeApp) -> None:
    """A foreign Host, no token and a wrong token are refused at every address; a POST needs the token as a header."""
    from werkzeug.test import Client

    for method, address in [
        ("GET", "/"), ("GET", "/status"), ("GET", "/report"), ("POST", "/check"), ("POST", "/merge"),
        ("POST", "/cancel"), ("GET", "/else"),
    ]:  # fmt: skip
        for headers in ({"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example:8765"}, {"X_Token": "x"}):
            assert ask(app, method, address, TIES, **headers)[0] == 403
        wanted = {"GET": {"/": 200, "/status": 200}, "POST": {}}[method].get(address, 404)
        if method == "GET":
            assert ask(app, method, address)[0] == wanted
            assert ask(app, method, f"{address}?token={app.token}", Host="localhost:9000")[0] == wanted
        answer = Client(app).open(
            f"{address}?token={app.token if method == 'POST' else ''}", method=method, headers={"Host": "127.0.0.1"}
        )
        assert answer.status_code == 403
    assert app.job.status()["state"] == "idle"
    assert ask(app, "POST", "/merge")[0] == 400  # no form
    assert ask(app, "POST", "/merge", TIES | {"yaml": "x" * (1 << 20)})[0] == 400  # too large


def test_listens_on_loopback_alone(slow: Path) -> None:
    """On 127.0.0.1, and on no other address of this machine; a port in use is one sentence."""
    server = make_server(MergeApp(str(slow), str), 0)
    try:
        assert server.socket.getsockname()[0] == "127.0.0.1"
        socket.create_connection(("127.0.0.1", server.port)).close()
        with pytest.raises(OSError):  # also this machine on Linux, which a server on all addresses would answer
            socket.create_connection(("127.0.0.2", server.port), timeout=5)
        with pytest.raises(UserError, match=rf"--port {server.port} cannot be used \(Address already in use\); give"):
            make_server(MergeApp(str(slow), str), server.port)
        with pytest.raises(UserError, match="--port 65536 is no port"):
            make_server(MergeApp(str(slow), str), 65536)
    finally:
        server.server_close()


def test_without_werkzeug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The message says what to install; a recipe beside --serve, and no recipe without it, are refused."""
    monkeypatch.setitem(sys.modules, "werkzeug", None)
    for words, sentence in [
        (["--serve"], 'pip install "trinity-moe[serve]"'),
        (["r.yaml", "--serve"], "--serve takes no recipe"),
        (["r.yaml"], "RECIPE.yaml or OUT_DIR is missing"),
    ]:
        assert call("merge.py", *words) == 2
        errors = capsys.readouterr().err
        assert sentence in errors
        assert errors.count("\n") == 1


def test_progress_and_cancel(slow: Path) -> None:
    """The bar is followed while the process runs; cancelling interrupts it as Ctrl-C does; then another may start."""
    job = MergeJob()
    job.start([sys.executable, str(slow)], {"form": 1})
    started(job)
    status = job.status()
    assert (status["state"], status["percent"], status["lines"], status["form"]) == ("running", 40, ["note: one"], 1)
    assert status["bar"].startswith("merging:  40%|")
    with pytest.raises(UserError, match="a merge is running"):
        job.start([sys.executable, str(slow)], {})
    job.cancel()
    job.wait()
    assert job.status()["state"] == "cancelled"
    assert (slow.parent / "interrupted").exists()
    job.start([sys.executable, "-c", "import sys; sys.exit('error: no')"], {})
    job.wait()
    assert (job.status()["state"], job.status()["lines"]) == ("failed", ["error: no"])


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "os.kill(os.getpid(), 9)",
            "error: the merge was ended by SIGKILL; the system does this where memory runs out;",
        ),
        ("print('merging:  40%|██  | 2/5 [00:01<00:02, 1.4it/s]', end=''); sys.exit('error: no')", "error: no"),
        ("sys.exit(3)", "error: the merge ended with exit code 3 and printed nothing"),
    ],
)
def test_says_why_a_merge_failed(code: str, said: str) -> None:
    """A signal, which leaves no message; and a message behind a bar that is still open."""
    job = MergeJob()
    job.start([sys.executable, "-c", f"import os, sys; {code}"], {})
    job.wait()
    status = job.status()
    assert status["state"] == "failed"
    assert len(status["lines"]) == 1
    assert status["lines"][0].startswith(said)


@pytest.mark.processes
def test_cancelled_merge_continues(app: MergeApp, family: Path) -> None:
    """A cancelled merge leaves no folder of that name; the same form merges then."""
    ask(app, "POST", "/merge", TIES)
    ask(app, "POST", "/cancel", {})
    app.job.wait()
    assert ask(app, "GET", "/status")[1]["state"] == "cancelled"
    assert not (family / "out").exists()
    ask(app, "POST", "/merge", TIES)
    app.job.wait()
    assert ask(app, "GET", "/status")[1]["state"] == "finished"


def test_last_text() -> None:
    """What a terminal shows after carriage returns and escapes."""
    assert last_text(b"\r\x1b[Ka: 1%|\r\x1b[Ka: 2%|\r") == "a: 2%|"
    assert last_text(b"\r   \r\x1b[Knote") == "note"
    assert last_text(b"\r  \r") == ""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_ends_the_merge(slow: Path, number: int) -> None:
    """Ctrl-C on the server, or SIGTERM, interrupts the merge and waits for it; exit code 130."""
    code = (
        "from trinity.errors import run_main; from trinity.reporting.merge_server.server import serve;"
        f"run_main(lambda: serve({str(slow)!r}, str, 0))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        url, token = re.search(r"(http://127\.0\.0\.1:\d+)/\?token=(\S+)", server.stdout.readline()).groups()
        fetch(f"{url}/merge", token, TIES)
        while "40%" not in fetch(f"{url}/status", token)["bar"]:
            time.sleep(0.05)
        server.send_signal(number)
        assert server.wait(100) == 130
    finally:
        server.kill()
        server.stdout.close()
    assert (slow.parent / "interrupted").exists()


def fetch(url: str, token: str, form: Any = None) -> Any:
    """A request over the network; the answer's JSON."""
    from urllib.request import Request, urlopen

    headers = {"X-Token": token, "Content-Type": "application/json"}
    with urlopen(Request(url, None if form is None else json.dumps(form).encode(), headers), timeout=100) as answer:
        return json.load(answer)


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium")
def test_in_a_browser(app: MergeApp, family: Path, tmp_path: Path) -> None:
    """Fill in the form, read a refusal, check, merge, reload, open the report; the page is no wider than a phone."""
    pytest.importorskip("plotly", reason='needs pip install "trinity-moe[report]"')
    server = make_server(app, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pictures = Path(os.environ.get("SCREENSHOTS", tmp_path))
    try:
        with Browser(tmp_path / "profile") as browser:
            drive(browser, app.url(server.port), pictures)
    finally:
        server.shutdown()
    assert (family / "out").is_dir()


def drive(browser: Browser, url: str, pictures: Path) -> None:
    """What a user does."""
    fill = (
        "(id, value) => { const field = document.getElementById(id); field.value = value; "
        "field.dispatchEvent(new Event('change')); }"
    )
    text = "document.getElementById('{}').textContent"
    browser.open(url)
    assert browser.run("document.querySelectorAll('#method option').length") == len(METHODS)
    unlabelled = "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length).length"
    assert browser.run(unlabelled) == 0
    browser.screenshot(pictures / "empty.png", 1100)
    browser.run(f"({fill})('method', 'ties')")
    for field, value in {"base_model": "base", "model-0": "a", "model-1": "b", "out_dir": "out"}.items():
        browser.run(f"({fill})('{field}', '{value}')")
    browser.run("document.getElementById('check').click()")
    browser.until("!document.getElementById('refused').hidden")
    assert browser.run(text.format("refused")) == "weight of model 1 has no default; fill it in"
    browser.screenshot(pictures / "refused.png", 1100)
    for field, value in {"model-0-weight": "0.5", "model-1-weight": "0.5", "report": "out.html"}.items():
        browser.run(f"({fill})('{field}', '{value}')")
    browser.run("document.getElementById('check').click()")
    browser.until("!document.getElementById('checked').hidden")
    assert "ties for" in browser.run(text.format("plan"))
    assert browser.run("document.getElementById('refused').hidden")
    browser.screenshot(pictures / "checked.png", 1100)
    browser.screenshot(pictures / "checked_phone.png", 390)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    browser.run("document.getElementById('merge').click()")
    browser.until(f"{text.format('state')} === 'Merging'")
    browser.screenshot(pictures / "merging.png", 1100)
    browser.open("about:blank")
    browser.open(url)  # while it runs
    browser.until(f"{text.format('state')} === 'Merged'")
    assert browser.run("document.getElementById('base_model').value") == "base"
    assert browser.run("document.getElementById('model-1-weight').value") == "0.5"
    assert browser.run(text.format("lines")).endswith("0 dropped")
    browser.screenshot(pictures / "merged.png", 1100)
    browser.screenshot(pictures / "merged_phone.png", 390)
    browser.open(browser.run("document.getElementById('report-link').href"))
    browser.run("document.querySelector('.figure').scrollIntoView()")
    browser.until("document.querySelector('.js-plotly-plot') !== null")
    browser.screenshot(pictures / "report.png", 1100)
