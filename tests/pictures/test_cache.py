"""The cache of features: what a tower sees once, it does not see again; what is torn is refused."""

import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from gemma4_tpu.data.drops import Origin
from gemma4_tpu.data.picture_cache import FeatureCache, Shown
from gemma4_tpu.data.pictures import PictureReader
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.models.vision_tower import PREFIX, PictureProcessor
from gemma4_tpu.models.vision_tower import Tower as FrozenTower

IMAGE_TOKEN = 7


class Tower:
    """Makes of a picture as many features as it is wide, and counts what it saw."""

    key, dtype, dim = "k" * 64, np.float32, 3

    def __init__(self):
        self.settings, self.seen = {}, 0

    def tokens(self, width, height):
        return width

    def encode(self, images):
        self.seen += len(images)
        return [np.full((image.width, self.dim), image.getpixel((0, 0))[0], np.float32) for image in images]


def pictures(folder, count=5):
    for n in range(count):
        Image.new("RGB", (n + 1, 4), (n, 0, 0)).save(folder / f"{n}.png")
    reader = PictureReader(Tower())
    return [reader.read(f"{n}.png", Origin(str(folder / "rows.jsonl"), 1)) for n in range(count)]


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path):
    return str(tmp_path / "cache") if request.param == "local" else f"memory://{tmp_path.name}/cache"


def test_each_picture_is_seen_once_by_one_process(tmp_path, place):
    given = pictures(tmp_path)
    towers = [Tower(), Tower()]
    caches = [FeatureCache(place, tower, (index, 2)) for index, tower in enumerate(towers)]
    for cache in caches:
        cache.ensure(given)
        cache.ensure(given)
    assert sum(tower.seen for tower in towers) == len(given) and all(tower.seen for tower in towers)
    assert not caches[0].missing([one.key for one in given])
    later = Tower()
    FeatureCache(place, later).ensure(given)
    assert later.seen == 0
    for picture, features in zip(given, caches[1].read([one.key for one in given]), strict=True):
        assert features.shape == (picture.tokens, 3)


def test_features_stand_at_the_soft_tokens_in_order(tmp_path, place):
    given = pictures(tmp_path, 3)
    cache = FeatureCache(place, Tower())
    cache.ensure(given)
    shown = Shown(cache, IMAGE_TOKEN)
    ids = np.array([1, 5, 7, 7, 6, 2, 5, 7, 7, 7, 6, 2])
    view = shown.empty(ids.shape)
    shown.lay(ids, [given[1].key, given[2].key], view)
    assert view[:, 0].tolist() == [0, 0, 1, 1, 0, 0, 0, 2, 2, 2, 0, 0]
    with pytest.raises(UserError, match="5 soft tokens but 4 features"):
        shown.lay(ids, [given[1].key, given[1].key], view)


def test_torn_and_lost_features_are_refused(tmp_path):
    (picture,) = pictures(tmp_path, 1)
    cache = FeatureCache(str(tmp_path / "cache"), Tower())
    cache.ensure([picture])
    (file,) = (path for path in (tmp_path / "cache").rglob("*") if path.name == picture.key)
    file.write_bytes(b"12345")
    with pytest.raises(UserError, match="incomplete"):
        cache.read([picture.key])
    file.unlink()
    assert cache.missing([picture.key]) == [picture.key]
    with pytest.raises(UserError, match="gone"):
        cache.read([picture.key])


def test_models_with_the_same_tower_share_a_cache(base, tmp_path):
    """As a base and what is merged of it, whose projector may be another."""

    def key(changed="", **settings):
        folder = shutil.copytree(base, tmp_path / f"{changed}{len(settings)}")
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if changed and changed in name]:
            tensors[name] = tensors[name] + 1
        save_file(tensors, folder / "model.safetensors")
        processor = PictureProcessor.of(str(folder))
        return FrozenTower(Checkpoint(str(folder)), PictureProcessor(processor.settings | settings)).key

    whole = key()
    assert whole == key("language_model") == key("embed_vision")
    assert len({whole, key(PREFIX), key(max_soft_tokens=140)}) == 3
