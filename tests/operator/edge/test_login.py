"""Credentials: where they come from, what is said when they cannot be used, how they stay fresh."""

import asyncio
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import kopf
import pytest
import trustme
from aiohttp import web

from cptjob_operator.edge.api import Api
from cptjob_operator.edge.api_errors import Unavailable
from cptjob_operator.edge.kinds import POD
from cptjob_operator.edge.login import Login, LoginError

WHOLE = """\
current-context: here
contexts: [{name: here, context: {cluster: ours, user: me}}]
clusters: [{name: ours, cluster: {server: "https://127.0.0.1:1"%s}}]
users: [{name: me, user: {token: secret}}]
"""
CANNOT = "cannot be used: "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, f"{CANNOT}FILE: No such file or directory"),
        ("a: [", f"{CANNOT}line 1 is no YAML"),
        ("", f"{CANNOT}Current context is not set in kubeconfigs."),
        ("words", f"{CANNOT}it is no kubeconfig"),
        ("- 1", f"{CANNOT}it is no kubeconfig"),
        ("current-context: there", f"{CANNOT}'there' is missing in it"),
        (WHOLE.replace("server", "host") % "", f"{CANNOT}its cluster has no server"),
        (
            WHOLE % ", certificate-authority: /nowhere/ca.crt",
            "certificates cannot be used: No such file or directory",
        ),
        (WHOLE % ", certificate-authority-data: bm90aGluZw==", "certificates cannot be used: "),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_told_in_a_line(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kubeconfig"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(file))
    with pytest.raises(LoginError) as caught:
        Login()
    assert message.replace("FILE", str(file)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_program_ends_with_that_line_and_its_own_code(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("")
    ended = subprocess.run(
        [sys.executable, "-m", "cptjob_operator", "--settings", str(settings)],
        env={"KUBECONFIG": str(tmp_path / "none")},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: kubeconfig ")
    assert ended.returncode == 78


def test_credentials_that_cannot_be_read_for_a_moment_stay_what_they_were() -> None:
    answers: list[kopf.ConnectionInfo | OSError] = [
        kopf.ConnectionInfo(server="http://api.invalid", token="old"),
        OSError("it is being written"),
        kopf.ConnectionInfo(server="http://api.invalid", token="new"),
    ]

    def find() -> kopf.ConnectionInfo:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    times = iter((0.0, 10.0, 70.0, 70.0, 140.0, 140.0))
    login = Login(find, lambda: next(times))
    tokens = [login.headers()["Authorization"] for _ in range(3)]
    assert tokens == ["Bearer old", "Bearer old", "Bearer new"]


def test_an_authority_that_took_over_is_trusted_without_a_new_start(tmp_path: Path) -> None:
    file, old, new = tmp_path / "ca.crt", trustme.CA(), trustme.CA()
    now = 0.0

    async def test() -> None:
        nonlocal now
        old.cert_pem.write_to_path(file)
        stop, port = await _serve(new)
        info = kopf.ConnectionInfo(server=f"https://127.0.0.1:{port}", ca_path=str(file))
        api = Api(Login(lambda: info, lambda: now), manager="test")
        try:
            with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
                await api.get(POD, "team", "one")
            new.cert_pem.write_to_path(file)
            now = 61.0
            assert await api.get(POD, "team", "one") == {}
        finally:
            await api.close()
            await stop()

    asyncio.run(test())


async def _serve(authority: trustme.CA) -> tuple[Callable[[], Awaitable[None]], int]:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({})

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    return runner.cleanup, runner.addresses[0][1]
