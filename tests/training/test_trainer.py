"""The trainer on tiny models and rows in memory: optimizers, losses, accumulation and resuming."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, default_data_collator

from hf_mmclf import MMClfTrainer, MMClfTrainingArguments
from hf_mmclf.evaluation.report import ComputeMetrics
from hf_mmclf.training.losses import MultiLabelLoss


@pytest.fixture
def arguments(tmp_path):
    def make(**options):
        given = dict(use_cpu=True, report_to="none", save_strategy="no", eval_strategy="no", disable_tqdm=True)
        return MMClfTrainingArguments(str(tmp_path), **{**given, "load_best_model_at_end": False, **options})

    return make


@pytest.fixture
def rows():
    """Rows of images and texts in memory, without padding, so that batches of any size are equal row by row."""

    def make(count=8):
        generator = torch.Generator().manual_seed(1)
        return [
            {
                "pixel_values": torch.randn(3, 64, 64, generator=generator),
                "input_ids": torch.randint(5, 60, (4,), generator=generator),
                "attention_mask": torch.ones(4, dtype=torch.long),
                "labels": (torch.rand(3, generator=generator) < 0.5).float(),
            }
            for _ in range(count)
        ]

    return make


class Plain(TrainerCallback):
    """Keep the model in evaluation mode, so that neither dropout nor BatchNorm's statistics depend on the batch."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.train = lambda mode=True: model


class Gradients(TrainerCallback):
    """Record the gradients of each step before the optimizer uses them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def by_parameter(model, optimizer):
    settings = {
        id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    return {name: settings.get(id(parameter)) for name, parameter in model.named_parameters()}


def test_learning_rates_by_part_and_no_decay_on_vectors(tiny_model, arguments):
    model = tiny_model(unfrozen_image_stages=1)
    args = arguments(learning_rate=1e-3, backbone_learning_rate=1e-4, weight_decay=0.1)
    trainer = MMClfTrainer(model, args)
    settings = by_parameter(model, trainer.create_optimizer())
    assert trainer.create_optimizer() is trainer.optimizer  # Trainer calls it again
    assert {None, (1e-4, 0.1), (1e-4, 0.0), (1e-3, 0.1), (1e-3, 0.0)} == set(settings.values())
    for name, parameter in model.named_parameters():
        rate = 1e-4 if name.startswith(("image_model", "text_model")) else 1e-3
        expected = (rate, 0.1 if parameter.ndim > 1 else 0.0) if parameter.requires_grad else None
        assert settings[name] == expected, name


def test_an_optimizer_class_is_used_with_the_backbones_own_learning_rate(tiny_model, arguments, rows):
    model = tiny_model()
    before = weights_of(model)
    args = arguments(max_steps=1, learning_rate=1e-3, backbone_learning_rate=1e-2, max_grad_norm=0, warmup_steps=0)
    gradients = Gradients()
    trainer = MMClfTrainer(
        model,
        args,
        train_dataset=rows(),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}),
        callbacks=[Plain(), gradients],
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    (found,) = gradients.steps
    for name, parameter in model.named_parameters():
        rate = 1e-2 if name.startswith(("image_model", "text_model")) else 0.5
        torch.testing.assert_close(parameter.data, before[name] - rate * found[name], atol=1e-6, rtol=1e-5)


def test_a_given_optimizer_is_kept(tiny_model, arguments, rows):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    before = weights_of(model)
    trainer = MMClfTrainer(model, arguments(max_steps=1), train_dataset=rows(), optimizers=(optimizer, None))
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert trainer.lr_scheduler is not None
    with pytest.raises(ValueError, match="optimizer is given, so backbone_learning_rate would be ignored"):
        MMClfTrainer(model, arguments(backbone_learning_rate=1e-4), optimizers=(optimizer, None))


class Groupless(torch.optim.SGD):
    """Like optimizers that step each layer in a hook: the groups do not hold the model's parameters."""

    def __init__(self, groups, **options):
        super().__init__([nn.Parameter(torch.zeros(1))], **options)


def test_a_learning_rate_of_backbones_that_cannot_be_set_is_an_error(tiny_model, arguments):
    trainer = MMClfTrainer(
        tiny_model(), arguments(backbone_learning_rate=1e-4), optimizer_cls_and_kwargs=(Groupless, {"lr": 1.0})
    )
    with pytest.raises(ValueError, match="Groupless has no groups of parameters, so backbone_learning_rate would be"):
        trainer.create_optimizer()


def test_a_loss_function_takes_precedence_over_the_criterion(tiny_model, arguments, rows):
    model, calls = tiny_model(), []

    def loss_of(outputs, labels, num_items_in_batch=None):
        calls.append(labels.shape)
        return outputs["logits"].sum() * 0 + 7.0

    options = dict(train_dataset=rows(), eval_dataset=rows(4), callbacks=[Plain()])
    trainer = MMClfTrainer(model, arguments(max_steps=1), compute_loss_func=loss_of, criterion=None, **options)
    assert trainer.train().training_loss == 7.0 and trainer.evaluate()["eval_loss"] == 7.0
    assert calls == [(8, 3), (4, 3)]


def test_the_criterion_is_the_loss_of_training_and_evaluation(tiny_model, arguments, rows):
    model, criterion = tiny_model(), MultiLabelLoss("focal")
    trainer = MMClfTrainer(model, arguments(), eval_dataset=rows(4), criterion=criterion)
    batch = trainer.data_collator(rows(4))
    with torch.no_grad():
        expected = criterion(model(**batch).logits, batch["labels"]).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected)


def test_the_criterion_is_the_loss_of_each_modality_too(tiny_model, arguments, rows):
    model = tiny_model(modality_classifiers=True)
    trainer = MMClfTrainer(model, arguments(), criterion=MultiLabelLoss("focal"), train_dataset=rows())
    batch = default_data_collator(rows(4))
    evaluated = trainer.compute_loss(model.eval(), batch)
    assert torch.equal(evaluated, MultiLabelLoss("focal")(model(**batch).logits, batch["labels"]))
    model.training = True  # without dropout and statistics of the batch
    output = model(**batch)
    image, text = output.modality_logits.unbind(1)
    expected = sum(MultiLabelLoss("focal")(logits, batch["labels"]) for logits in (output.logits, image, text))
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.loss.item() > evaluated.item()


def test_training_rows_have_a_collator_of_their_own(tiny_model, arguments, rows):
    plain = default_data_collator
    trainer = MMClfTrainer(
        tiny_model(),
        arguments(),
        train_dataset=rows(4),
        eval_dataset=rows(4),
        data_collator=plain,
        train_data_collator=lambda batch: plain(batch * 2),
    )
    assert len(next(iter(trainer.get_train_dataloader()))["labels"]) == 8
    assert len(next(iter(trainer.get_eval_dataloader()))["labels"]) == 4
    assert trainer.data_collator is plain


def test_accumulated_batches_have_the_loss_and_gradients_of_one_large_batch(tiny_model, arguments, rows):
    found = []
    for size, accumulated in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        gradients = Gradients()
        args = arguments(
            optim="sgd",  # AdamW would divide rounding errors by gradients that are almost 0
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            logging_steps=1,
            max_grad_norm=0,
        )
        options = dict(train_dataset=rows(), callbacks=[Plain(), gradients])
        trainer = MMClfTrainer(tiny_model(), args, **options)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses, gradients.steps, weights_of(trainer.model)))
    (losses, steps, weights), (accumulated_losses, accumulated_steps, accumulated_weights) = found
    assert len(losses) == len(steps) == 2
    assert accumulated_losses == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(accumulated_steps[0], steps[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(accumulated_weights, weights, atol=1e-4, rtol=1e-3)


def test_resuming_under_accumulation_ends_with_the_same_weights(tiny_model, arguments, rows, tmp_path):
    def run(checkpoint=None):
        torch.manual_seed(0)
        model = tiny_model()
        options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=3)
        args = arguments(**options, save_strategy="steps", save_steps=1, save_total_limit=None, seed=3)
        trainer = MMClfTrainer(model, args, train_dataset=rows(12), callbacks=[Plain()])
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.state.global_step, weights_of(model)

    steps, whole = run()
    assert steps == 9
    for step in (2, 4):  # in the first epoch, and in the second
        resumed_steps, resumed = run(str(Path(tmp_path) / f"checkpoint-{step}"))
        assert resumed_steps == steps
        assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_a_last_batch_of_one_row_trains(tiny_model, arguments, rows):
    model = tiny_model(fusion="concat", projection_norm=True)
    before = weights_of(model)
    args = arguments(num_train_epochs=1, per_device_train_batch_size=4)
    trainer = MMClfTrainer(model, args, train_dataset=rows(5))
    assert trainer.train().global_step == 2
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])


def test_a_run_prints_one_line_for_each_evaluation_and_no_logs(tiny_model, arguments, rows, capsys):
    options = dict(eval_strategy="epoch", save_strategy="epoch", num_train_epochs=2, logging_steps=1)
    trainer = MMClfTrainer(
        model=tiny_model(),
        args=arguments(**options),
        train_dataset=rows(),
        eval_dataset=rows(4),
        data_collator=default_data_collator,
        compute_metrics=ComputeMetrics(),
    )
    trainer.train()
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert [line.split(",")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    saved = [*Path(trainer.args.output_dir).rglob("model.safetensors")]
    assert len(saved) == 2 and {path.stat().st_mode & 0o044 for path in saved} == {0o044}
