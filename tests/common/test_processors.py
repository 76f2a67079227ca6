"""transformers' `ImageProcessingTestMixin` and `ProcessorTesterMixin` on our classes."""

import unittest

from support.tiny_folder import CAPTIONS
from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from tests.test_processing_common import ProcessorTesterMixin

from hf_mmclf import MMClfImageProcessor, MMClfProcessor
from hf_mmclf.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("train", CAPTIONS, 60)[0]


class MMClfImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **fields):
        defaults = {"size": {"longest_edge": 20}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5]}
        super().__init__(parent, **{"do_normalize": True, **defaults, **fields})

    def _get_image_processing_classes(self):
        return {"torchvision": MMClfImageProcessor}

    def expected_output_image_shape(self, images):
        return self.num_channels, self.size["longest_edge"], self.size["longest_edge"]


class TestImageProcessor(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = MMClfImageProcessingTester
    test_cast_dtype = True


class TestProcessor(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MMClfProcessor

    @classmethod
    def _setup_image_processor(cls):
        return MMClfImageProcessor(size=32)

    @classmethod
    def _setup_tokenizer(cls):
        return TOKENIZER

    @classmethod
    def _get_component_class_from_processor(cls, attribute, use_fast=True):
        return {"image_processor": MMClfImageProcessor, "tokenizer": type(TOKENIZER)}[attribute]
