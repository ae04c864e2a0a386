"""Who the operator is, as its Deployment tells it, and which namespaces it looks after."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from cptjob_operator import run
from cptjob_operator.plan.rules import plan
from cptjob_operator.run import Operator, own_identity
from cptjob_operator.settings import parse

MANIFESTS = Path(__file__).parents[2] / "deploy" / "operator.yaml"


def _environment() -> dict[str, str]:
    """Variables of the operator's container that say something of its pod, and the field of each."""
    with MANIFESTS.open() as file:
        documents: list[dict[str, Any]] = list(yaml.safe_load_all(file))
    (deployment,) = (each for each in documents if each and each["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return {
        each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"]
        for each in container["env"]
        if "valueFrom" in each
    }


def test_a_container_that_is_started_anew_in_its_pod_keeps_the_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, field in _environment().items():
        monkeypatch.setenv(name, field)
    assert own_identity() == "metadata.name_metadata.uid"


def test_a_namespace_without_rights_holds_up_no_other_and_is_watched_once_it_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = {"two"}

    async def answer(request: web.Request) -> web.Response:
        if request.match_info["namespace"] in closed:
            return web.json_response({"message": "cptjobs is forbidden"}, status=403)
        return web.json_response({"items": [], "metadata": {"resourceVersion": "1"}})

    async def test() -> None:
        application = web.Application()
        application.router.add_get("/{_:.*}/namespaces/{namespace}/cptjobs", answer)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server = f"http://127.0.0.1:{runner.addresses[0][1]}"
        _write_kubeconfig(tmp_path / "config", server)
        operator = Operator(parse("watchedNamespaces: [one, two]"), plan, "one")
        operator._look_after(await operator._wait_for_kind())
        assert operator.namespaces == ("one",)
        waits = asyncio.ensure_future(operator._until_others_are_allowed())
        await asyncio.sleep(0.1)
        assert not waits.done()
        closed.clear()
        await asyncio.wait_for(waits, 10)
        for api in (operator.api, operator._plain):
            await api.close()
        await runner.cleanup()

    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(run, "_ALLOWED_SECONDS", 0.01)
    asyncio.run(test())


def _write_kubeconfig(path: Path, server: str) -> None:
    document = {
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": server}}],
        "users": [{"name": "test", "user": {}}],
    }
    path.write_text(yaml.safe_dump(document))
