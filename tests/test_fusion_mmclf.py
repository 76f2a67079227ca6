import torch
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from hf_mmclf import MMClfConfig
from hf_mmclf.fusion_mmclf import LabelClassifier, LabelQueries

THINGS, COLOURS, WORDS = 3, 4, 30
LOOKS = torch.randn(THINGS + COLOURS, 16, generator=torch.Generator().manual_seed(1))


def rows(count, seed):
    """Cells of four coloured things, words of which one is a colour; label i: the thing of that colour is the i-th."""
    draw = torch.Generator().manual_seed(seed)
    things = torch.randint(THINGS, (count, 4), generator=draw)
    colours = torch.stack([torch.randperm(COLOURS, generator=draw) for _ in range(count)])
    looks = torch.cat([F.one_hot(things, THINGS), F.one_hot(colours, COLOURS)], 2).float() @ LOOKS
    words = torch.randint(COLOURS, WORDS, (count, 8), generator=draw)
    asked = torch.randint(COLOURS, (count,), generator=draw)
    words[torch.arange(count), torch.randint(8, (count,), generator=draw)] = asked
    return looks, words, F.one_hot(things[colours == asked[:, None]], THINGS).float()


def test_label_queries_learn_which_word_means_what_in_the_picture():
    """From 2,000 rows; neither modality alone says anything about these labels."""
    fusion = LabelQueries(MMClfConfig(fusion="label_queries", num_labels=THINGS, width=32), [16, 16])
    embed, classify = torch.nn.Embedding(WORDS, 16), LabelClassifier(32, THINGS)
    parameters = [*fusion.parameters(), *embed.parameters(), *classify.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)

    def logits(looks, words):
        everywhere = torch.ones(len(looks), 1, dtype=torch.bool)
        return classify(fusion((looks, everywhere.expand(-1, 4)), (embed(words), everywhere.expand(-1, 8))))

    looks, words, labels = rows(2000, 0)
    for _ in range(12):
        for batch in torch.randperm(2000).split(50):
            loss = F.binary_cross_entropy_with_logits(logits(looks[batch], words[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    looks, words, labels = rows(1000, 1)
    with torch.no_grad():
        assert average_precision_score(labels, logits(looks, words), average="macro") > 0.95
