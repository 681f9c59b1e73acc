import pytest
import torch

from openclip_ext import UserError
from openclip_ext.files import checkpoints
from openclip_ext.training.checkpoint import load_checkpoint, save_checkpoint


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.margin = torch.nn.Parameter(torch.tensor(0.5))
        self.register_buffer("bank", torch.zeros(3))


def trained(with_loss_group):
    torch.manual_seed(1)
    model, loss = torch.nn.Linear(3, 2), Loss()
    optimizer = torch.optim.AdamW(model.parameters())
    if with_loss_group:
        optimizer.add_param_group({"params": list(loss.parameters())})
    (model(torch.ones(3)).sum() * loss.margin).backward()
    optimizer.step()
    loss.bank += 2
    return model, optimizer, loss


def save(path, model, optimizer, loss, distributed=False):
    save_checkpoint(str(path), epoch=3, name="n", model=model, optimizer=optimizer, scaler=None, loss=loss,
                    distributed=distributed)  # fmt: skip


def test_a_parameter_of_the_loss_is_restored_without_disturbing_openclips_optimizer(tmp_path):
    model, optimizer, loss = trained(True)
    save(tmp_path / "a.pt", model, optimizer, loss)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.optim.AdamW(torch.nn.Linear(3, 2).parameters()).load_state_dict(content["optimizer"])  # as OpenCLIP would
    fresh_loss = Loss()
    fresh = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters())
    fresh.add_param_group({"params": list(fresh_loss.parameters())})
    checkpoint = load_checkpoint(str(tmp_path / "a.pt"))
    assert checkpoint.epoch == 3
    assert checkpoint.restore(optimizer=fresh, scaler=None, loss=fresh_loss) == []
    torch.testing.assert_close(fresh.state_dict(), optimizer.state_dict())
    torch.testing.assert_close(fresh_loss.state_dict(), loss.state_dict())


def test_a_checkpoint_of_openclip_starts_the_loss_anew_and_says_so(tmp_path):
    model, optimizer, loss = trained(False)
    content = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()},
               "optimizer": optimizer.state_dict()}  # fmt: skip
    torch.save(content, tmp_path / "a.pt")
    fresh_model, fresh_loss = torch.nn.Linear(3, 2), Loss()
    fresh = torch.optim.AdamW(fresh_model.parameters())
    fresh.add_param_group({"params": list(fresh_loss.parameters())})
    checkpoint = load_checkpoint(str(tmp_path / "a.pt"))
    checkpoint.restore_model(fresh_model, "m")
    remarks = checkpoint.restore(optimizer=fresh, scaler=None, loss=fresh_loss)
    assert remarks == ["it holds no loss state: the loss starts anew",
                       "the loss's parameters have no optimizer state in it"]  # fmt: skip
    torch.testing.assert_close(fresh_model.state_dict(), model.state_dict())
    assert (fresh_loss.bank == 0).all()


def test_bare_weights_load_and_start_the_rest_anew(tmp_path):
    model, optimizer, loss = trained(False)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    fresh = torch.nn.Linear(3, 2)
    checkpoint = load_checkpoint(str(tmp_path / "a.pt"))
    checkpoint.restore_model(fresh, "m")
    remarks = checkpoint.restore(optimizer=optimizer, scaler=None, loss=loss)
    assert checkpoint.epoch == 0 and "weights only" in remarks[0]
    torch.testing.assert_close(fresh.state_dict(), model.state_dict())


def test_an_optimizer_of_another_kind_is_refused(tmp_path):
    model, optimizer, loss = trained(False)
    save(tmp_path / "a.pt", model, optimizer, Loss())
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    with pytest.raises(UserError, match="its optimizer state does not fit --opt"):
        load_checkpoint(str(tmp_path / "a.pt")).restore(
            optimizer=torch.optim.AdamW([*groups, {"params": [torch.nn.Parameter(torch.ones(1))]}]),
            scaler=None, loss=Loss(),
        )  # fmt: skip


def test_several_ranks_write_the_prefix_that_openclip_writes(tmp_path):
    model, optimizer, loss = trained(False)
    save(tmp_path / "a.pt", model, optimizer, loss, distributed=True)
    assert set(torch.load(tmp_path / "a.pt")["state_dict"]) == {"module.weight", "module.bias"}


def test_the_first_of_checkpoints_is_that_of_the_last_epoch(tmp_path):
    assert checkpoints(str(tmp_path / "none")) == []
    for name in ("epoch_2.pt", "epoch_10.pt", "epoch_11.pt.partial", "epoch_latest.pt"):
        (tmp_path / name).touch()
    assert checkpoints(str(tmp_path)) == [str(tmp_path / f"epoch_{number}.pt") for number in (10, 2)]
    assert checkpoints(str(tmp_path), most_recent=True) == [str(tmp_path / "epoch_latest.pt")]


def test_a_file_that_holds_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"epoch": 1, "state_dict": Evil()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a checkpoint of tensors and plain values"):
        load_checkpoint(str(tmp_path / "a.pt"))
