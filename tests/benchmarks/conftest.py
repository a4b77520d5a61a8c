"""What `--benchmark-json` writes says where it was measured, and by which code, but not which machine that was."""

import pytest

from vdbench.provenance import code_digest, cpu_model, package_versions


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["machine_info"] = {"cpu": cpu_model()}
    output_json["machine_info"] |= {"versions": package_versions(), "code_digest": code_digest()}
    del output_json["commit_info"]
