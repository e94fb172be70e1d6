"""Compiled programs on disk: by their content, whole or absent, whoever else writes there."""

import os
import threading

import pytest

from gemma4_tpu.planning import kept_programs


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gemma4_tpu" / "plans"


def test_what_is_kept_is_found_again(cache):
    assert kept_programs.get("a") is None
    kept_programs.put("a", {"program": [1.5, "x"]})
    assert kept_programs.get("a") == {"program": [1.5, "x"]}
    assert kept_programs.folder() == cache


def test_a_program_is_known_by_all_that_decides_it():
    versions, options, devices = {"libtpu": "0.0.42"}, {"xla_tpu_x": True}, ["TPU v5 [0, 0, 0]"]
    keys = {
        kept_programs.key("module", versions, options, devices),
        kept_programs.key("another", versions, options, devices),
        kept_programs.key("module", {"libtpu": "0.0.43"}, options, devices),
        kept_programs.key("module", versions, {}, devices),
        kept_programs.key("module", versions, options, ["TPU v6 lite [0, 0, 0]"]),
    }
    assert len(keys) == 5
    assert kept_programs.key("module", versions, options, devices) in keys


@pytest.mark.parametrize("damage", [b"", b"not gzip", None])
def test_what_cannot_be_read_counts_as_absent(cache, damage):
    kept_programs.put("a", {"program": list(range(1000))})
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    assert kept_programs.get("a") is None
    kept_programs.put("a", 1)
    assert kept_programs.get("a") == 1


def test_many_plans_at_a_time_leave_whole_files(cache):
    values = [{"who": n, "rest": [n] * 20_000} for n in range(4)]
    seen = []

    def work(value):
        for _ in range(5):
            kept_programs.put("a", value)
            seen.append(kept_programs.get("a"))

    threads = [threading.Thread(target=work, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one in values for one in seen)
    assert [path.name for path in cache.iterdir()] == ["a.json.gz"]


def test_what_was_not_used_for_longest_makes_room(cache, monkeypatch):
    for number, name in enumerate("abc"):
        kept_programs.put(name, os.urandom(3000).hex())
        os.utime(cache / f"{name}.json.gz", (number, number))
    monkeypatch.setattr(kept_programs, "KEPT_BYTES", 3 * (cache / "a.json.gz").stat().st_size + 100)
    kept_programs.get("a")  # used now
    kept_programs.put("d", os.urandom(3000).hex())
    assert {path.name[0] for path in cache.iterdir()} == {"a", "c", "d"}


def test_a_folder_that_cannot_be_written_to_costs_nothing_but_the_cache(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kept_programs.put("a", 1)
    assert "cannot cache" in caplog.text
    assert kept_programs.get("a") is None
