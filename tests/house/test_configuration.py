"""docs/configuration.md says what the schema says, every key changes something, every file of conf/ composes."""

from itertools import zip_longest

import pytest
from omegaconf import OmegaConf

from gemma4_tpu.config import machines, outputs, rollouts, schema, serving, tasks
from gemma4_tpu.config.conf import config_dir, defaults, groups_of
from gemma4_tpu.config.keys import field_types, is_group
from gemma4_tpu.launch import schema as launch_schema
from tests.house.reads import definer, keys_read
from tests.house.scripts import ROOT, script

CONFIGURATION = script("docs/make_configuration.py")
COMMANDS = CONFIGURATION.COMMANDS
CLASSES = {
    name: cls for module in (machines, outputs, rollouts, schema, serving, tasks, launch_schema)
    for name, cls in vars(module).items() if is_group(cls) and cls.__module__ == module.__name__
}  # fmt: skip
SPENT_BY_THE_CHECKS = {
    ("TrainerConfig", "global_batch_tokens"): "recipe.rows_per_update, which every caller asks",
    ("MeshConfig", "dp"): "meshes.resolve_mesh, which every caller asks",
    ("MeshConfig", "fsdp"): "meshes.resolve_mesh, which every caller asks",
    ("MeshConfig", "tp"): "meshes.resolve_mesh, which every caller asks",
    ("EvalConfig", "resimulate"): "evals/checks: which form of evaluation it is",
    ("EvaluateRoot", "selfcheck"): "evals/checks: which form of evaluation it is",
    ("MergeRoot", "run"): "export/checks: MergeChecked.runs",
    ("ServeRoot", "run"): "serving/checks: ServeChecked.model",
    ("ServeRoot", "architecture"): "serving/model_checks: ServeChecked.architecture",
    ("ServeRoot", "adapters"): "serving/checks: ServeChecked.adapters",
    ("BenchRoot", "endpoint"): "benching/checks: BenchChecked.endpoint",
    ("BenchRoot", "served"): "benching/checks: BenchChecked.endpoint, .slice",
    ("BenchRoot", "slice"): "benching/checks: BenchChecked.slice",
    ("BenchRoot", "architecture"): "benching/checks: BenchChecked.vocabulary",
    ("ReportRoot", "price_list"): "reporting/checks: ReportChecked.subject",
}
"""Keys that the checks turn into what they found out, and where. Everything else must be read above them."""

CHECKS = ("meshes", "recipe")
"""Where mesh and batch come out, beside the checks that ask."""


def test_the_page_is_what_the_schema_says():
    made = CONFIGURATION.page()
    assert made == CONFIGURATION.PAGE.read_text(encoding="utf-8"), "make it anew: python docs/make_configuration.py"


def test_every_key_is_read_beyond_its_checks():
    """By the types that functions declare: `config.rank` counts where `config` is a LoraConfig."""
    files = [path for folder in ("gemma4_tpu", "launch", "hydra_plugins") for path in (ROOT / folder).rglob("*.py")]
    checks = {
        path for path in files
        if path.parent == ROOT / "gemma4_tpu/config" or path.stem.endswith("checks") or path.stem in CHECKS
    }  # fmt: skip
    read = keys_read([path for path in files if path not in checks], CLASSES)
    keys = {
        (name, field) for name, cls in CLASSES.items() for field, kind in field_types(cls).items()
        if definer(cls, field) is cls and not is_group(kind)
    }  # fmt: skip
    assert len(keys) > 180
    assert keys - read == set(SPENT_BY_THE_CHECKS), "a key that nothing reads, or an exception that is none any more"
    assert set(SPENT_BY_THE_CHECKS) <= keys_read(sorted(checks), CLASSES)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"train", "gke"}))
def test_every_file_composes_for_every_command_that_takes_it(name):
    """The n-th options of all groups together: a file that only composes alone would be a trap, too.

    Those of `train` are loaded one by one in tests/config/test_load.py; `gke` takes the groups of `tpu_vm`.
    """
    assert groups_of(COMMANDS["gke"]) == groups_of(COMMANDS["tpu_vm"])
    entry = COMMANDS[name]
    groups = {group: options for group, options in groups_of(entry).items() if group != "local"}
    for chosen in zip_longest(*groups.values()):
        words = [f"{group}={option}" for group, option in zip(groups, chosen, strict=True) if option is not None]
        root = OmegaConf.to_object(defaults(entry, words))
        assert isinstance(root, entry.schema), words


def test_every_file_belongs_to_a_command():
    taken = {group for entry in COMMANDS.values() for group in groups_of(entry)} | {"space"}
    assert {path.name for path in config_dir().iterdir() if path.is_dir()} == taken
    assert {path.stem for path in config_dir().glob("*.yaml")} == set(COMMANDS)
