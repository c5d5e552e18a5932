"""Patches on the hub, against a stand-in of its endpoints on this machine: pushed, fetched, and refused in one line."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import oracle_models
import pytest
from command import Run
from oracle_models import FAILURES, TEXT, bold_star

from lmrepair import ModelError, Patch, PatchError, UsageError, load, repair
from lmrepair.cli.patches.hub import card
from lmrepair.failures import read_reference
from lmrepair.measure import verify
from lmrepair.patch import save_model

FORM = "{repo_id}/resolve/{revision}/{filename}"
NAME, TOKEN = "someone/fix-dates", "hf_stand_in"


class Hub:
    """What the stand-in holds: repository → path → content; and whether it is private."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}


class Endpoints(BaseHTTPRequestHandler):
    """Creation, a look at the card, pre-upload, commit and resolution, as far as they are asked for."""

    hub: Hub

    @property
    def here(self) -> str:
        return f"http://{self.headers['Host']}"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, b'{"error": "Invalid username or password."}')
        elif self.path == "/api/repos/create":
            asked = json.loads(content)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.hub.repositories.setdefault(name, {})
            self.hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            self._answer(200, json.dumps({"url": f"{self.here}/{name}", "id": name, "name": name}).encode())
        elif self.path == "/api/validate-yaml":
            wrong = [] if json.loads(content)["content"].startswith("---\n") else [{"message": "no YAML"}]
            self._answer(200, json.dumps({"errors": wrong, "warnings": []}).encode())
        elif self.path.endswith("/preupload/main"):
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(content)["files"]]
            self._answer(200, json.dumps({"files": [{**one, "shouldIgnore": False} for one in files]}).encode())
        else:
            name = self.path.removeprefix("/api/models/").split("/commit/")[0]
            for line in content.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.hub.repositories[name][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            made = {"commitUrl": f"{self.here}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "hookOutput": ""}
            self._answer(200, json.dumps(made).encode())

    def do_GET(self) -> None:
        name, _, path = self.path.removeprefix("/api/models").lstrip("/").partition("/resolve/main/")
        name = name.split("/tree/")[0]
        found = self.hub.repositories.get(name, {}).get(path)
        if found is None:
            code = "EntryNotFound" if name in self.hub.repositories else "RepoNotFound"
            self._answer(404, b"", X_Error_Code=code)
            return
        tag = hashlib.sha256(found).hexdigest()
        self._answer(200, found, ETag=f'"{tag}"', X_Repo_Commit="0" * 40)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    held = Hub()
    handler = type("Here", (Endpoints,), {"hub": held})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", address := f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{FORM}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield held
        server.shutdown()


@pytest.fixture(scope="module")
def patch() -> Patch:
    made = repair(oracle_models.net(), FAILURES[:2], bold_star(learning_rate=0.1), TEXT).patch
    assert made is not None
    return made


def test_a_patch_goes_up_with_a_card_and_comes_down_as_it_was(hub: Hub, patch: Patch, run: Run) -> None:
    patch.save("p")
    code, out, err = run("push", "p", NAME, "--license", "apache-2.0", "--json")
    assert code == 0, err
    assert json.loads(out)["repository"] == NAME
    files = hub.repositories[NAME]
    assert files["patch.safetensors"] == patch.serialise()
    page = files["README.md"].decode()
    assert page.startswith('---\nlibrary_name: "lmrepair"\n')
    for part in (
        'license: "apache-2.0"',
        FAILURES[0].prompt,
        "It repairs 2 of 2",
        patch.fingerprint.body,
        f"hub:{NAME}",
    ):
        assert part in page
    assert Patch.load(f"hub:{NAME}").serialise() == patch.serialise()
    code, out, _ = run("show", f"hub:{NAME}")
    assert code == 0
    assert FAILURES[0].prompt in out


def test_failures_can_be_withheld_from_card_and_file(hub: Hub, patch: Patch, run: Run) -> None:
    patch.save("p")
    assert run("push", "p", NAME, "--private-failures", "--private")[0] == 0
    assert hub.private[NAME]
    for content in hub.repositories[NAME].values():
        for failure in FAILURES[:2]:
            assert failure.prompt.encode() not in content
            assert f'"{failure.id}"'.encode() not in content
    assert b"made for 2 failures, which are not public" in hub.repositories[NAME]["README.md"]
    shared = Patch.load(f"hub:{NAME}")
    assert (shared.items, shared.made.withheld) == ((), 2)
    net, other = oracle_models.net(), oracle_models.net()
    shared.apply(net)
    patch.apply(other)
    assert all(oracle_models.same_bits(net.columns(at), other.columns(at)) for at in range(net.layers))
    with pytest.raises(PatchError, match="keeps its failures to itself"):
        verify(net, shared, read_reference())
    shared.revert(net)


def test_what_cannot_be_pushed_or_fetched_is_one_line(
    hub: Hub, patch: Patch, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch.save("p")
    hub.repositories["someone/empty"] = {}
    for arguments, said in (
        (("show", "hub:someone/nothing"), "hub:someone/nothing: .*expected a repository with patch.safetensors"),
        (("show", "hub:someone/empty"), "hub:someone/empty: .*expected a repository with patch.safetensors"),
        (("show", "hub:nobody"), "is no name on the hub; expected OWNER/NAME"),
        (("push", "p", "../x"), "is no name on the hub"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert re.search(said, err), err
        assert err.count("\n") == 1
    monkeypatch.setenv("HF_TOKEN", "wrong")
    code, _, err = run("push", "p", NAME)
    assert code == 2
    assert "the patch was not pushed: is there a token" in err
    assert NAME not in hub.repositories
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert run("push", "p", NAME)[0] == 2
    with pytest.raises(UsageError):
        Patch.load("hub:")


def test_a_model_on_the_hub_is_loaded_and_its_wishes_for_code_are_refused(hub: Hub, tmp_path: Path) -> None:
    net = oracle_models.net()
    save_model(net, tmp_path / "made")
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    hub.repositories["someone/tiny"] = files
    found = load("hub:someone/tiny")
    assert (found.name, found.source.kind) == ("someone/tiny", "hub")
    assert all(oracle_models.same_bits(net.columns(at), found.columns(at)) for at in range(net.layers))
    config = json.loads(files["config.json"])
    asked = json.dumps({**config, "attn_implementation": "someone/kernel"}).encode()
    hub.repositories["someone/other"] = {**files, "config.json": asked}
    with pytest.raises(ModelError, match="asks for the code of 'someone/kernel'"):
        load("hub:someone/other")
    with pytest.raises(ModelError, match="someone/nothing"):
        load("hub:someone/nothing")


def test_nothing_that_a_stranger_wrote_is_markup_in_a_card(patch: Patch) -> None:
    item = replace(patch.items[0], prompt="`| <script> [x](y)\n# no\x1b[31m", target="|---|")
    page = card(replace(patch, items=(item,)), NAME, None)
    (row,) = [line for line in page.splitlines() if "<script>" in line]
    assert row.count("|") == 4
    assert row.startswith("| `` ")
    assert "\x1b" not in page
