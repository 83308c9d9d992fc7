"""What is not collected where an extra is missing: the core's tests need neither torch nor flax."""

import importlib.util

_NEEDS = {
  "torch": ["hina_optax/torch_bridge/*", "tests/torch_bridge/*",
            "tests/examples/test_example_torch_bridge.py"],
  "flax": ["tests/test_flax.py", "tests/examples/*"],
}
collect_ignore_glob = [
  pattern for package, patterns in _NEEDS.items() if importlib.util.find_spec(package) is None
  for pattern in patterns
]
