"""helm, and a control plane for the chart: without the definition of CPTJob, which helm installs."""

import shutil
from collections.abc import Iterator

import pytest

from helmchart import Helm
from testplane import binaries
from testplane.plane import ControlPlane


def pytest_configure(config: pytest.Config) -> None:
    # The client library's own use of urllib3.
    config.addinivalue_line("filterwarnings", "ignore:HTTPResponse.getheader:DeprecationWarning")


@pytest.fixture(scope="session", name="report")
def make_report(pytestconfig: pytest.Config) -> binaries.Report:
    return binaries.past_capture(pytestconfig.pluginmanager.getplugin("capturemanager"))


@pytest.fixture(scope="session", name="helm")
def make_helm(tmp_path_factory: pytest.TempPathFactory, report: binaries.Report) -> Helm:
    """helm without a cluster."""
    return Helm(binaries.find(["helm"], report)["helm"], tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session", name="plane")
def start_plane(
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    report: binaries.Report,
) -> Iterator[ControlPlane]:
    folder = tmp_path_factory.mktemp("plane")
    failed_before = request.session.testsfailed
    with ControlPlane(folder, report=report) as plane:
        yield plane
    if request.session.testsfailed > failed_before:
        report(f"\nlogs of the control plane: {folder}/*.log")
    else:
        shutil.rmtree(folder)
