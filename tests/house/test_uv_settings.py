"""Where pip is set up, uv is too."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def uv() -> ModuleType:
    spec = importlib.util.spec_from_file_location("uv_wrapper", ROOT / "requirements" / "uv.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_pips_file_and_environment_say_reaches_uv(
    uv: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://mirror.example/simple\nfind-links = /a\n  /b\n"
        "[install]\ncert = /from/install.pem\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    for name in ("PIP_INDEX_URL", "PIP_CERT", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://one.example https://two.example")
    result = uv.environment({}, uv.pip_settings())
    assert result["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert result["UV_FIND_LINKS"] == "/a,/b"
    assert result["SSL_CERT_FILE"] == "/from/install.pem"
    assert result["UV_INDEX"] == "https://one.example https://two.example"


def test_pips_environment_wins_over_its_file(
    uv: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nindex-url = https://file.example/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_INDEX_URL", "https://environment.example/simple")
    assert uv.pip_settings()["index-url"] == "https://environment.example/simple"


def test_a_variable_of_uv_is_never_overridden(uv: ModuleType) -> None:
    given = {"UV_DEFAULT_INDEX": "https://mine.example", "UV_SYSTEM_CERTS": "0"}
    assert uv.environment(given, {"index-url": "https://pip.example"}) == given
