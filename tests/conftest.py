"""CPU, two fake devices so that sharding is exercised, and no silent broadcasts between ranks."""

import gc
import os
import shutil
import subprocess

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A test compiles much and computes little: the last four make code several times faster, and the code slower.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=2"
    + " --xla_backend_optimization_level=0"
    + " --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false"
    + " --xla_cpu_parallel_codegen_split_count=1"  # else a program is cut into many parts, for threads without cores
)
# JAX takes as many threads as there are cores. Two fake devices that meet in a collective wait in two of them: on two
# cores a third task that they need may then never run, and JAX ends the process after 40 s.
os.environ.setdefault("NPROC", "8")
os.environ.setdefault("MUJOCO_GL", "disabled")
# What one test has compiled serves the others, their child processes and the next run: test_compilation.py proves it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".cache", "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many small objects that stay: with Python's own threshold of 700 a tenth of a test is the search for
# garbage among them.
gc.set_threshold(20_000, 10, 10)


def pytest_collection_finish():
    """What has been imported stays, so that no search for garbage needs to look at it again."""
    gc.collect()
    gc.freeze()


class Subset(type(Path())):
    """The small part of the reference files that is committed: a test that asks for more of them is skipped."""

    def __truediv__(self, name):
        path = super().__truediv__(name)
        inside_a_dataset = "shared" in self.parts and self.parts[::-1].index("shared") > 1
        if "shared" in self.parts and not inside_a_dataset and not path.exists():
            pytest.skip(f"{path} is not in the committed subset of the reference files; set ACRLPD_SHARED to the whole")
        return path


COMMITTED = Subset(__file__).parent / "data" / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Root of the reference files: ``ACRLPD_SHARED``, else ``../shared``, else the subset under ``tests/data``.

    Under CI (the variable ``CI`` is set) a root that was asked for and is absent fails.
    """
    asked = os.environ.get("ACRLPD_SHARED")
    root = Path(asked) if asked else Path(__file__).parents[2] / "shared"
    if (root / "golden").is_dir():
        return root
    if asked or os.environ.get("CI"):
        pytest.fail(f"reference files not found: {root} has no golden/ folder; set ACRLPD_SHARED to the right root")
    return COMMITTED


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """A worker that keeps every program that any test compiled comes to hold 6 GB."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files of a certificate for localhost and of its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the test's certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert]
    subprocess.run([*make, *names], check=True, capture_output=True)
    return cert, key
