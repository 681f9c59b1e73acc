"""Slow reference implementations: plain loops over anchors and negatives, in float64, differentiated by autograd."""

import math

import torch


def unit(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(
        dtype
    )


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
