"""transformers' `ModelTesterMixin` and `ConfigTester` on models of each kind."""

import copy
import unittest

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask

from hf_mmclf import MMClfConfig, MMClfForImageTextClassification

RESNET = {"image_backbone": "test_resnet"}
VIT = {"image_backbone": "test_vit", "image_backbone_args": {"img_size": 32}}
EFFICIENTNET = {"image_backbone": "test_efficientnet"}
TEXT = {
    "text_config": {
        "model_type": "bert",
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "max_position_embeddings": 64,
    }
}
NORMS = {"learned_missing": True, "fusion_norm": True, "projection_norm": True, "dropout": 0.1}
FROZEN, PARTLY = ({"unfrozen_image_stages": n, "unfrozen_text_layers": n} for n in (0, 1))

KINDS = {
    "Image": RESNET,
    "ImageLabelQueries": {**VIT, "fusion": "label_queries", "image_tokens": "spatial"},
    "TextPooler": TEXT,
    "TextMean": {**TEXT, "text_pooling": "mean"},
    "TextLabelQueries": {**TEXT, "fusion": "label_queries"},
    "Self": {**RESNET, **TEXT},
    "CrossText": {**VIT, **TEXT, "fusion": "cross_text", "image_tokens": "spatial"},
    "CrossImage": {**RESNET, **TEXT, "fusion": "cross_image", "image_tokens": "stages"},
    "Concat": {**EFFICIENTNET, **TEXT, "fusion": "concat"},
    "LabelQueries": {**EFFICIENTNET, **TEXT, "fusion": "label_queries", "image_tokens": "stages"},
    "Norms": {**RESNET, **TEXT, **NORMS, "image_tokens": "spatial"},
    "ModalityDropout": {**RESNET, **TEXT, "modality_dropout": 0.3},
    "Frozen": {**RESNET, **TEXT, **FROZEN},
    "PartlyFrozen": {**RESNET, **TEXT, **PARTLY},
}

# The tests that do not apply, by the backbone because of which they do not, with the reason.
WITH_IMAGES = {
    "test_can_init_all_missing_weights": "timm draws the weights of its models; the test leaves out transformers' own"
    " wrapper of timm for the same reason",
    "test_load_contiguous_weights": "convolutions have the channels-last layout, in which they are faster",
}
NO_TOKENS = "a model without a text backbone has no embeddings of tokens"
NO_HIDDEN_STATES = "timm returns no hidden states, so a model without a text backbone refuses to return them"
NO_LAYER = "the test looks for transformers' GradientCheckpointingLayer; timm checkpoints its models itself"
WITHOUT_TEXTS = {
    "test_inputs_embeds": NO_TOKENS,
    "test_model_get_set_embeddings": NO_TOKENS,
    "test_resize_tokens_embeddings": NO_TOKENS,
    "test_batching_equivalence": NO_HIDDEN_STATES,
    "test_hidden_states_output": NO_HIDDEN_STATES,
    "test_model_outputs_equivalence": NO_HIDDEN_STATES,
    "test_retain_grad_hidden_states_attentions": NO_HIDDEN_STATES,
    "test_gradient_checkpointing_enable_disable": NO_LAYER,
    "test_training_gradient_checkpointing": NO_LAYER,
    "test_training_gradient_checkpointing_use_reentrant_false": NO_LAYER,
    "test_training_gradient_checkpointing_use_reentrant_true": NO_LAYER,
}
NO_GRADIENTS = "the test asks for gradients of what the configuration freezes, of which no activations are kept"
FROZEN_PARTS = {
    "test_retain_grad_hidden_states_attentions": NO_GRADIENTS,
    "test_training_gradient_checkpointing": NO_GRADIENTS,
    "test_training_gradient_checkpointing_use_reentrant_false": NO_GRADIENTS,
    "test_training_gradient_checkpointing_use_reentrant_true": NO_GRADIENTS,
}


class ModelTester:
    """What the common tests ask for: a configuration, inputs, and the sizes in both."""

    batch_size, seq_length, image_size, num_labels = 3, 7, 32, 4
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_training = True

    def __init__(self, kind):
        self.kind = kind

    def prepare_config_and_inputs_for_common(self):
        config = MMClfConfig(width=16, num_labels=self.num_labels, **copy.deepcopy(self.kind))
        inputs = {}
        if config.has_image:
            inputs["pixel_values"] = floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        if config.has_text:
            inputs["input_ids"] = ids_tensor([self.batch_size, self.seq_length], config.text_config.vocab_size)
            inputs["attention_mask"] = random_attention_mask([self.batch_size, self.seq_length])
        return config, inputs


class CommonTests(ModelTesterMixin):
    all_model_classes = (MMClfForImageTextClassification,)
    has_attentions = False
    test_resize_embeddings = True
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True
    kind: dict

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = ModelTester(self.kind)
        fields = {"width": 16, "dropout": 0.25, **self.kind}
        fields.pop("text_config", None)  # it gets more fields when it is read
        self.config_tester = ConfigTester(
            self, MMClfConfig, has_text_modality=False, common_properties=["width", "dropout", "threshold"], **fields
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels:
            inputs["labels"] = torch.ones(len(next(iter(inputs.values()))), self.model_tester.num_labels)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()


def common_tests(kind):
    """The common tests for a kind of model, without those that do not apply."""
    left_out = dict(WITH_IMAGES) if "image_backbone" in kind else {}
    left_out |= {} if "text_config" in kind else WITHOUT_TEXTS
    left_out |= FROZEN_PARTS if "unfrozen_text_layers" in kind else {}
    skipped = {name: unittest.skip(reason)(getattr(CommonTests, name)) for name, reason in left_out.items()}
    return type("Tests", (CommonTests, unittest.TestCase), {"kind": kind, **skipped})


for name, kind in KINDS.items():
    globals()[f"Test{name}"] = common_tests(kind)
