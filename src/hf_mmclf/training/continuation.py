"""Going on from a finished model: its architecture, weights, preprocessing and tokenizer, with labels by name."""

import copy
import dataclasses
from pathlib import Path

import torch
from transformers.utils import logging

from ..data.reachability import check_reachable
from ..inference.quiet import no_progress_bars
from ..model.configuration_mmclf import MMClfConfig
from ..model.modeling_mmclf import MMClfForImageTextClassification
from ..model.pipeline_mmclf import load_model
from ..model.processing_mmclf import MMClfProcessor
from .arguments import ModelArguments

logger = logging.get_logger(__name__)

# Arguments that apply to a finished model too. All others are those of its training.
APPLICABLE = ("dropout", "modality_dropout", "min_labels", "unfrozen_image_stages", "unfrozen_text_layers")
# Tensors with one row for each label.
LABEL_TENSORS = ("classifier.weight", "classifier.bias", "fusion.queries")
LABEL_TENSORS += tuple(
    f"modality_classifiers.{part}.{kind}" for part in ("image", "text") for kind in ("weight", "bias")
)


@dataclasses.dataclass
class StartingModel:
    """
    A finished model from which a run starts.

    Args:
        name (`str`): The name of its folder, or its name on the Hub.
        model ([`MMClfForImageTextClassification`]): The model.
        processor ([`MMClfProcessor`]): Its processor.
    """

    name: str
    model: MMClfForImageTextClassification
    processor: MMClfProcessor

    @classmethod
    def load(cls, args: ModelArguments) -> "StartingModel":
        """
        Load the model that `args.init_from` names.

        Raises:
            `ValueError`: If other arguments contradict it, or if it is damaged.
            `OSError`: If it is not there.
        """
        free = ("init_from", "preset", "max_tokens", *APPLICABLE)
        others = [field for field in dataclasses.fields(args) if field.name not in free]
        given = [f"--{field.name}" for field in others if getattr(args, field.name) != field.default]
        if given:
            raise ValueError(f"--init_from brings architecture and preprocessing; leave out {', '.join(given)}")
        check_reachable(args.init_from)
        with no_progress_bars():
            finished = cls(Path(args.init_from).name, *load_model(args.init_from))
        if finished.processor.tokenizer is not None:
            own = finished.processor.tokenizer.model_max_length
            finished.model.limit_text(finished.processor.tokenizer, min(own, args.max_tokens))
        return finished

    def config(self, args: ModelArguments) -> MMClfConfig:
        """Return its configuration with the changes of the arguments, and without fitted thresholds."""
        config = copy.deepcopy(self.model.config)
        config.threshold, config.label_thresholds, config.missing_thresholds, config.min_labels = 0.5, None, None, 0
        for name in APPLICABLE:
            if (value := getattr(args, name)) is not None:
                setattr(config, name, None if value == -1 else value)  # -1 trains the whole backbone
        return config

    @torch.no_grad()
    def start(self, config: MMClfConfig) -> MMClfForImageTextClassification:
        """
        Create a model with the weights of this one. Classifiers are kept by label, and those of new labels are random.

        Args:
            config ([`MMClfConfig`]): The configuration of [`StartingModel.config`] with the labels of the new rows.
        """
        model = MMClfForImageTextClassification(config)
        own, old = self.model.state_dict(), self.model.config
        known = dict(zip(old.label_names, range(old.num_labels), strict=True))
        known |= dict(zip(old.label_ids or (), range(old.num_labels), strict=False))
        kept = {new: known[label] for new, label in enumerate(config.label_ids) if label in known}
        for name, tensor in model.state_dict().items():
            if name in LABEL_TENSORS:
                for new, row in kept.items():
                    tensor[new] = own[name][row]
            elif name in own:  # vectors for missing modalities may be new
                tensor.copy_(own[name])
        fresh, dropped = config.num_labels - len(kept), old.num_labels - len(set(kept.values()))
        logger.info(f"labels: {len(kept)} of {self.name} are kept, {fresh} are new, {dropped} are dropped")
        return model
