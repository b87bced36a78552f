"""What holds for any input: augmentation, metrics and the pick of the mistakes, tried on drawn ones by Hypothesis."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import utils

settings.register_profile("here", deadline=None, derandomize=True, database=None)  # the same examples on every machine
settings.load_profile("here")
SHIFTS = st.integers(-8, 8)


@given(st.lists(st.tuples(SHIFTS, SHIFTS, st.booleans()), min_size=1, max_size=4), st.integers(0, 2**31))
def test_crops_and_flips(moves, seed):
    """Every pixel comes from where the shift says, reflected at the border; a flip undoes itself."""
    images = torch.randint(0, 256, (len(moves), 32, 32, 3), generator=torch.Generator().manual_seed(seed))
    shift, flip = torch.tensor([move[:2] for move in moves]), torch.tensor([move[2] for move in moves])
    ours = utils.crop_and_flip(images, shift, flip)
    still = torch.zeros_like(shift)
    assert torch.equal(utils.crop_and_flip(ours, still, flip), utils.crop_and_flip(images, shift, flip & False))
    row, column = (torch.randint(0, 32, (1,), generator=torch.Generator().manual_seed(seed + 1)).item() for _ in "yx")
    for image, result, (down, right, mirrored) in zip(images, ours, moves, strict=True):
        y, x = row + down, (31 - column if mirrored else column) + right
        y, x = (-at if at < 0 else 62 - at if at > 31 else at for at in (y, x))
        assert torch.equal(result[row, column], image[y, x])


@st.composite
def outcomes(draw):
    """Labels, predictions and confidences of some images."""
    n = draw(st.integers(1, 60))
    labels, predictions = (draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)) for _ in range(2))
    confidences = draw(st.lists(st.integers(1, 5), min_size=n, max_size=n))  # few values: many ties
    return torch.tensor(labels), torch.tensor(predictions), torch.tensor(confidences) / 5


@given(outcomes(), st.integers(1, 12))
def test_pick_of_the_mistakes(outcome, count):
    labels, predictions, confidences = outcome
    chosen = utils.most_confident_mistakes(predictions, confidences, labels, count).tolist()
    wrong = [i for i in range(len(labels)) if labels[i] != predictions[i]]
    assert chosen == sorted(wrong, key=lambda i: (-confidences[i].item(), i))[:count]


@given(outcomes())
def test_confusion_counts_every_image_once(outcome):
    labels, predictions, _ = outcome
    counts = utils.confusion(predictions, labels)
    assert counts.sum() == len(labels)
    assert counts.diagonal().sum() == (labels == predictions).sum()
    assert torch.equal(counts.sum(1), labels.bincount(minlength=10))
    assert torch.equal(counts.sum(0), predictions.bincount(minlength=10))
    assert torch.equal(utils.confusion(labels, predictions), counts.T)


@given(outcomes(), st.integers(0, 2**31))
def test_scores_by_plain_arithmetic(outcome, seed):
    """Of a net that says what it is told to, image by image."""
    labels, _, _ = outcome
    logits = torch.randn(len(labels), 10, generator=torch.Generator().manual_seed(seed)) * 5

    class Told(torch.nn.Module):
        said = 0

        def forward(self, x):
            part = logits[self.said : self.said + len(x)]
            self.said += len(x)
            return part

    scores = utils.test(Told(), torch.zeros(len(labels), 32, 32, 3, dtype=torch.uint8), labels)
    probabilities = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    loss = -sum(probabilities[i, label].log() for i, label in enumerate(labels.tolist())) / len(labels)
    assert abs(scores.loss - loss) < 1e-4
    assert scores.predictions.tolist() == [max(range(10), key=line.__getitem__) for line in logits.tolist()]
    assert abs(scores.accuracy - 100 * (scores.predictions == labels).double().mean()) < 1e-4
    assert (scores.confidences - probabilities.max(1).values).abs().max() < 1e-5
