"""transformers' common tests on our classes. They are in its source archive only, which `make test-common` fetches."""

import os
import sys
from types import ModuleType

# What the common tests import from test modules that are not in the archive.
STUBS = {
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "tests.utils.test_configuration_utils": {
        "config_common_kwargs": {"return_dict": False, "output_hidden_states": True, "problem_type": "regression"}
    },
    "fetch_hub_objects_for_ci": {"url_to_local_path": str},
}

if "TRANSFORMERS_SOURCE" in os.environ:
    sys.path.insert(0, os.environ["TRANSFORMERS_SOURCE"])
    for name, content in STUBS.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
else:
    collect_ignore_glob = ["test_*.py"]
