"""What times the fused step says where it can't."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "error: batch-size is 0; give a whole number from 1 to 50000"),
        ([], "error: there is no CUDA GPU to time the step on"),
    ],
)
def test_what_can_not_be_timed_ends_in_one_line(monkeypatch, capsys, arguments, message):
    from engine import tune

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
