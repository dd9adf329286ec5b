"""Every setting has its help, and an impossible one is refused by name."""

from dataclasses import fields

import pytest

from ldm3d.config import InputError, field_comments
from ldm3d.data import AugmentConfig, DataConfig


def test_every_setting_has_its_help_in_a_comment():
    for cls in (DataConfig, AugmentConfig):
        names = {f.name for f in fields(cls)} - {"augment"}
        assert names - set(field_comments(cls)) == set()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"size": (8, 8)}, "size"),
        ({"spacing": (1.0, 0.0, 1.0)}, "spacing"),
        ({"spacing": (1.0, 1e-9, 1.0)}, "spacing"),
        ({"size": (10**5, 10**5, 10**5)}, "size"),
        ({"patch": (10**30, 1, 1)}, "patch"),
        ({"percentiles": (99.0, 1.0)}, "percentiles"),
        ({"window": (5.0, 5.0)}, "window"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "test_fraction"),
        ({"fold": (3, 3)}, "fold"),
        ({"resize": True}, "resize"),
        ({"label_values": (0, 255), "num_labels": 3}, "label_values"),
        ({"dims": 2, "augment": AugmentConfig(flip_axes=(2,))}, "augment"),
        ({"subset": 0}, "subset"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(changes, name):
    with pytest.raises(InputError, match=f"^{name}: "):
        DataConfig(**changes)


def test_an_impossible_augmentation_is_refused_by_name():
    for name, value in (("rot90_axes", (1, 1)), ("rot90_axes", (0,)), ("affine", 1.5)):
        with pytest.raises(InputError, match=f"^{name}: "):
            AugmentConfig(**{name: value})
