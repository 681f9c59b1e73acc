"""Slow reference implementations: plain loops over anchors and negatives, in float64, differentiated by autograd."""

import math
import statistics

import torch


def unit(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(
        dtype
    )


def near_pairs(count, width):
    """Float32 images, and texts that lie near them, as after some training."""
    image = unit(count, width, seed=1, dtype=torch.float32)
    return image, torch.nn.functional.normalize(image + 0.6 * unit(count, width, seed=2, dtype=torch.float32), dim=-1)


def ratios(image, text, scale):
    """[direction][anchor] -> list of (column, q_ij), every j != i."""
    directions = []
    for anchors, columns in ((image, text), (text, image)):
        rows = []
        for i in range(len(anchors)):
            positive = scale * torch.dot(anchors[i], columns[i])
            rows.append(
                [(j, scale * torch.dot(anchors[i], columns[j]) - positive) for j in range(len(columns)) if j != i]
            )
        directions.append(rows)
    return directions


def mean_ratio(row):
    return sum(q.exp() for _, q in row) / len(row)


def over_anchors(image, text, scale, value):
    """Mean over both directions and all anchors of value(direction, anchor, row)."""
    directions = ratios(image, text, scale)
    values = [value(d, i, row) for d, rows in enumerate(directions) for i, row in enumerate(rows)]
    return sum(values) / len(values)


def clip(image, text, scale):
    return over_anchors(image, text, scale, lambda d, i, row: torch.log(1 + sum(q.exp() for _, q in row)))


def dcl(image, text, scale):
    return over_anchors(image, text, scale, lambda d, i, row: torch.log(sum(q.exp() for _, q in row)))


def siglip(image, text, scale, bias):
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            sign = 1.0 if i == j else -1.0
            total = total - torch.nn.functional.logsigmoid(sign * (scale * torch.dot(image[i], text[j]) + bias))
    return total / len(image)


def corrected(image, text, scale, *, negatives, iota=1.0):
    return over_anchors(image, text, scale, lambda d, i, row: torch.log(iota + negatives * mean_ratio(row)))


def rates(image, text, scale, old, ids, *, negatives, iota, gamma):
    """R after this batch, [direction][anchor]; `old` maps (direction, id) to R."""
    new = []
    for d, rows in enumerate(ratios(image, text, scale)):
        new.append([])
        for i, row in enumerate(rows):
            estimate = float(iota + negatives * mean_ratio(row))
            key = (d, int(ids[i]))
            new[d].append((1 - gamma) * old[key] + gamma * estimate if key in old else estimate)
    return new


def decomposed(image, text, scale, rate, *, negatives, draws=None):
    """The M-step sum u_i K mean_j r_ij.detach() q_ij, whose gradient is the gradient of gamma_decomp."""

    def value(d, i, row):
        u = 1 / rate[d][i] if draws is None else draws[d][i] / rate[d][i]
        return u * negatives * sum(q.exp().detach() * q for _, q in row) / len(row)

    return over_anchors(image, text, scale, value)


def mean_log(rate):
    flat = [math.log(value) for row in rate for value in row]
    return sum(flat) / len(flat)


def gradients(function, image, text, scale):
    leaves = [tensor.detach().clone().double().requires_grad_() for tensor in (image, text, scale)]
    return torch.autograd.grad(function(*leaves), leaves)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def norm(a):
    length = dot(a, a).sqrt()
    return [x / length for x in a]


def brownian_bridge(image, text, image_aug, tau):
    total = 0.0
    for v, t, a in zip(image, text, image_aug, strict=True):
        total = total + distance(a, norm([tau * x + (1 - tau) * y for x, y in zip(v, t, strict=True)]))
    return total / len(image)


def geometric_consistency(image, text, image_aug=None, text_aug=None):
    total, rows = 0.0, range(len(image))
    for j in rows:
        for k in rows:
            total = total + (dot(image[j], text[k]) - dot(image[k], text[j])) ** 2
            total = total + (dot(image[j], image[k]) - dot(text[j], text[k])) ** 2
            if image_aug is not None:
                total = total + (dot(image[j], image[k]) - dot(image_aug[j], image_aug[k])) ** 2
                total = total + (dot(text[j], text[k]) - dot(text_aug[j], text_aug[k])) ** 2
        if image_aug is not None:
            total = total + (dot(image[j], text[j]) - dot(image_aug[j], text_aug[j])) ** 2
    return total / len(image)


def feature_separation(shared, private, private_aug, scale):
    """Each argument but the last is (images, texts), as lists of rows."""
    total = 0.0
    for own, p, a in zip(shared, private, private_aug, strict=True):
        rows = range(len(p))
        total = total + sum(dot(own[j], p[j]) ** 2 for j in rows) / len(p)
        entropy = sum(
            sum((scale * dot(p[j], a[k])).exp() for k in rows).log() - scale * dot(p[j], a[j]) for j in rows
        ) / len(p)
        spread = [(-2 * distance(p[j], p[k])).exp() for j in rows for k in rows if j != k]
        total = total + entropy / 2 + (sum(spread) / len(spread)).log() / 2
    return total


def recent_weight(form, log_sum, count, positive, negatives):
    """What a score's exponential is divided by, as a log: an anchor's offset in the loss `form`."""
    if form in ("dcl", "sogclr"):
        return log_sum
    if form == "clip":
        return torch.logaddexp(log_sum, positive)
    log_k, log_n = math.log(negatives), math.log(count)
    return torch.nn.functional.softplus(log_sum - positive - log_n + log_k) - log_k + log_n + positive


def with_recent_pairs(form, fresh, stored, scale, negatives):
    """A scalar with the gradient of a batch that stored pairs have joined, by loops over anchors and columns.

    Stored columns push as if their mean were that of the batch's other columns, and stored anchors in all with the
    weight with which the batch's anchors meet stored columns.

    `fresh` and `stored`: (image, text, ids); in `stored` log sums (2, S) and counts (S,) of its anchors follow.
    """
    image, text, ids = fresh
    old_image, old_text, old_ids, log_sums, counts = stored
    constant = scale.detach()
    total = 0.0
    met = torch.zeros(2, len(ids), dtype=image.dtype)  # the weight with which an image or a text meets stored ones
    taken, given, pushes = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]  # by whether columns are images or texts
    given_to = torch.zeros_like(met)
    for direction, (anchors, columns, old_anchors, old_columns) in enumerate(
        ((image, text, old_image, old_text), (text, image, old_text, old_image))
    ):
        kind = 1 - direction
        for i in range(len(ids)):
            others = [columns[j] for j in range(len(ids)) if ids[j] != ids[i]]
            others += [old_columns[j] for j in range(len(old_ids)) if old_ids[j] != ids[i]]
            positive = scale * anchors[i] @ columns[i]
            scores = torch.stack([scale * anchors[i] @ other for other in others])
            offset = recent_weight(form, scores.logsumexp(0), len(others), positive, negatives).detach()
            weights = (scores - offset).exp().detach()
            of_stored = weights[sum(bool(ids[j] != ids[i]) for j in range(len(ids))) :].sum()
            met[direction, i] += of_stored
            taken[kind] += of_stored
            total = total + (weights * (scores - positive)).sum()
        for a in range(len(old_ids)):
            own = [j for j in range(len(ids)) if ids[j] != old_ids[a]]
            scores = torch.stack([constant * old_anchors[a] @ columns[j] for j in own])
            log_sum = torch.logaddexp(log_sums[direction][a], scores.logsumexp(0))
            positive = constant * old_anchors[a] @ old_columns[a]
            offset = recent_weight(form, log_sum, int(counts[a]) + len(own), positive, negatives).detach()
            weights = (scores - offset).exp().detach()
            given[kind] += weights.sum()
            given_to[kind, own] += weights
            pushes[kind] = pushes[kind] + (weights * scores).sum()
    for kind in range(2):  # stored anchors push with as much weight as stored columns have taken
        total = total + taken[kind] / given[kind] * pushes[kind]
        met[kind] += taken[kind] / given[kind] * given_to[kind]
    for kind, (anchors, columns, old_columns) in enumerate(((image, text, old_text), (text, image, old_image))):
        for i in range(len(ids)):  # stored columns are moved to the mean of the batch's others
            others = torch.stack([columns[j] for j in range(len(ids)) if j != i]).detach()
            total = total + met[kind, i] * constant * anchors[i] @ (others.mean(0) - old_columns.mean(0))
    return total / (2 * len(ids))


def slow_recall(image, text, owner, k):
    """Both ways' recall at k from sorted lists in float64: whether any of the query's own is among the first k."""
    scores = image.double() @ text.double().T
    of_images = [i for i in range(len(image)) if (owner == i).any()]
    found_texts = [any(owner[j] == i for j in scores[i].argsort(descending=True)[:k]) for i in of_images]
    found_images = [owner[j] in scores[:, j].argsort(descending=True)[:k] for j in range(len(text))]
    return statistics.fmean(found_texts), statistics.fmean(found_images)


def caption_words(trunk, captions, head, seen, special_ids, end_id=None):
    """Of pooled image features, token ids per caption (lists), and W; `seen` are the captions of earlier steps."""

    def words(caption):
        kept = caption[: caption.index(end_id)] if end_id in caption else caption
        return sorted(set(kept) - set(special_ids))

    documents, total = [words(caption) for caption in [*seen, *captions]], 0.0
    for x, caption in zip(trunk, captions, strict=True):
        scores = [sum(w * value for w, value in zip(row, x, strict=True)) for row in head]
        normalizer = torch.log(sum(score.exp() for score in scores))
        weights = {}
        for word in words(caption):
            holding = sum(word in document for document in documents)
            weights[word] = max(0.0, math.log(len(documents) / (1 + holding)))
        for word, weight in weights.items():
            if weight:
                total = total - weight / sum(weights.values()) * (scores[word] - normalizer)
    return total / len(captions)
