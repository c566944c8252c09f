"""A part copied from a store is, byte for byte, what extracting only that part writes."""

from pathlib import Path

import pytest

from infra.objects import FolderObjects
from pipeline.extract import extract
from storage_schemas.copy import copy_store
from storage_schemas.indices import parse_layers
from tests.pipeline_jobs import ALONE, digest_of, fake_config, make_tree


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), 21, odd=True)


@pytest.mark.parametrize(("layers", "limit"), [("0,2", None), ("1-3", 11), (None, 16)])
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_layers_and_limit(images, tmp_path, layers, limit, precision):
    whole, part, target = tmp_path / "whole", tmp_path / "part", tmp_path / "copy"
    extract(fake_config(images, whole, precision=precision), ALONE)
    rounded = None if limit is None else -(-limit // 8) * 8
    extract(fake_config(images, part, precision=precision, layers=layers, limit=rounded), ALONE)
    kept = parse_layers(layers) if layers else None
    copy_store(FolderObjects(whole), FolderObjects(target), layers=kept, limit=limit)
    assert digest_of(target) == digest_of(part)
    assert list((target / "head_input/c").iterdir()), "head_input is kept, as by an extraction"
