import numpy as np
import pytest
import torch

import models
import pictures
import utils
from utils import Scores


@pytest.mark.parametrize("name", utils.NETS)
def test_maps_average_to_the_logits(name, small):
    torch.manual_seed(0)
    net = getattr(models, name)().train()
    net(utils.standardise(small.images[:50]))  # so that batch norm has running averages
    images = small.test_images[:8]
    maps = pictures.class_activation_maps(net, images)
    assert maps.shape == (8, 10, 8, 8)
    logits = net.eval()(utils.standardise(images))
    assert torch.allclose(maps.mean((2, 3)), logits, atol=1e-5)


LABELS = torch.tensor([0, 0, 0, 0, 0, 0])
SCORES = {
    "NetA": Scores(0, 0, torch.tensor([1, 0, 1, 1, 0, 1]), torch.tensor([0.3, 0.9, 0.5, 0.7, 0.9, 0.8])),
    "NetB": Scores(0, 0, torch.tensor([0, 0, 2, 0, 0, 2]), torch.tensor([0.9, 0.9, 0.6, 0.9, 0.9, 0.4])),
    "NetC": Scores(0, 0, torch.tensor([0, 3, 3, 0, 0, 0]), torch.tensor([0.9, 0.9, 0.6, 0.9, 0.9, 0.4])),
}


def test_who_is_wrong():
    found = {names: indices.tolist() for names, indices in pictures.who_is_wrong(SCORES, LABELS).items()}
    assert found == {
        ("NetA",): [3, 0],
        ("NetB",): [],
        ("NetC",): [1],
        ("NetA", "NetB"): [5],
        ("NetA", "NetC"): [],
        ("NetB", "NetC"): [],
        ("NetA", "NetB", "NetC"): [2],
    }


def test_same_images_name_every_net(small):
    data = utils.replace(small, test_images=small.test_images[:6], test_labels=LABELS)
    figure = pictures.plot_same(SCORES, data, each=2)
    weights = {text.get_text(): text.get_weight() for axis in figure.axes for text in axis.texts}
    assert weights[f"NetA {data.classes[1]} 70 %"] == "bold"  # wrong
    assert weights[f"NetB {data.classes[0]} 90 %"] == "normal"
    assert weights[data.classes[0]] == "normal"
    assert sum(len(axis.images) for axis in figure.axes) == 5  # each image that is wrong for someone


def test_cam_is_red_where_the_wrong_class_gains(small):
    data = utils.replace(small, test_images=small.test_images[:6], test_labels=LABELS)
    nets = {name: getattr(models, name)() for name in SCORES}
    figure = pictures.plot_cam(nets, SCORES, data, count=1)
    assert [axis.get_title() for axis in figure.axes] == [
        f"true: {data.classes[0]}",
        *(
            f"{name}: {data.classes[guess]} {sure} %"
            for name, guess, sure in zip(nets, (1, 2, 3), (50, 60, 60), strict=True)
        ),
    ]
    for axis, (name, net) in zip(figure.axes[1:], nets.items(), strict=True):
        maps = pictures.class_activation_maps(net, data.test_images[2:3])[0]
        expected = maps[SCORES[name].predictions[2]] - maps[0]
        heat = axis.images[1]
        drawn = torch.tensor(heat.get_array())
        for part in (slice(None, 16), slice(16, None)):  # rows, then columns
            for shown, true in (
                (drawn[part], expected.repeat_interleave(4, 0)[part]),
                (drawn[:, part], expected.repeat_interleave(4, 1)[:, part]),
            ):
                assert shown.mean() == pytest.approx(true.mean().item(), abs=0.1 * expected.abs().max().item())
        assert heat.cmap.name == "RdBu_r"
        assert heat.norm.vmin == -heat.norm.vmax


def test_chain_shows_shapes_and_parameters():
    figure = pictures.plot_chain()
    texts = [text.get_text() for axis in figure.subfigs[0].axes for text in axis.texts]
    assert [text for text in texts if text in dict(models.NetA().named_children())] == list(
        dict(models.NetA().named_children())
    )
    assert sum(int(text.replace(",", "")) for text in texts if text.replace(",", "").isdigit()) == 48_042
    assert texts.count("24x16x16") == 5


@pytest.mark.parametrize(
    ("number", "layer"),
    [
        (0, models.NORMS["batch"](8, 4)),
        (1, models.NORMS["layer"](8, 4)),
        (2, models.NORMS["group"](8, 4)),
        (3, torch.nn.GroupNorm(8, 8)),
    ],
)
def test_drawn_means_are_what_the_norms_take(number, layer):
    """Where a change of one activation changes what the first one is normalised to."""
    _, _, shared = pictures.shared_means()[number]
    x = torch.randn(4, 8, 6, 1)
    reaches = np.zeros(shared.shape, bool)
    for place in np.ndindex(*shared.shape):
        moved = x.clone()
        moved[(*place, 0)] += 1
        reaches[place] = not torch.equal(layer(moved)[0, 0, 0], layer(x)[0, 0, 0])
    assert (reaches == shared).all()
