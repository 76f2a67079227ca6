from transformers import AutoConfig, AutoModel
from .configuration_mmclf import MMClfConfig
from .modeling_mmclf import MMClfForImageTextClassification
from .presets import PRESETS, config_from_preset
AutoConfig.register(MMClfConfig.model_type, MMClfConfig)
AutoModel.register(MMClfConfig, MMClfForImageTextClassification)
