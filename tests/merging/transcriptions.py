"""Every merge method in float64, on whole tensors, transcribed from its formula and not from trinity.merging.

Arguments: W the models' tensors, B the base's; both [R, C] in float64.
"""

import math

import torch

Tensor = torch.Tensor


def linear(W, B, weight, normalize):
    total = sum(w * x for w, x in zip(weight, W))
    return total / sum(weight) if normalize else total


def slerp(W, B, t):
    a, b = B.flatten(), W[0].flatten()
    cosine = (a / a.norm()) @ (b / b.norm())
    if abs(cosine) > 0.9995:
        return (1 - t) * B + t * W[0]
    theta = torch.arccos(cosine)
    return torch.sin((1 - t) * theta) / torch.sin(theta) * B + torch.sin(t * theta) / torch.sin(theta) * W[0]


def nuslerp(W, B, weight, nuslerp_flatten, nuslerp_row_wise):
    t = weight[1] / sum(weight)
    a, b = (W[0], W[1]) if B is None else (W[0] - B, W[1] - B)

    def arc(x, y):
        theta = torch.arccos(((x / x.norm()) @ (y / y.norm())).clamp(-1, 1))
        return (torch.sin((1 - t) * theta) * x + torch.sin(t * theta) * y) / torch.sin(theta)

    if nuslerp_flatten or a.shape[0] == 1:
        result = arc(a.flatten(), b.flatten()).view(a.shape)
    elif nuslerp_row_wise:  # mergekit's name for columns
        result = torch.stack([arc(a[:, j], b[:, j]) for j in range(a.shape[1])], 1)
    else:
        result = torch.stack([arc(x, y) for x, y in zip(a, b)])
    return result if B is None else B + result


def multislerp(W, B, weight, normalize_weights, eps):
    X = W if B is None else [x - B for x in W]
    w = [each / sum(weight) for each in weight] if normalize_weights else weight
    U = [x / x.norm() for x in X]
    mu = sum(a * u for a, u in zip(w, U))
    mu = mu / mu.norm()
    T = sum(a * (u - (u * mu).sum() * mu) for a, u in zip(w, U))
    n = T.norm()
    result = (mu * torch.cos(n) + T * torch.sin(n) / n) * sum(a * x.norm() for a, x in zip(w, X))
    return result if B is None else B + result


def karcher(W, B, max_iter, tol):
    U = [x / x.norm() for x in W]
    u = sum(U) / len(U)
    u = u / u.norm()
    for _ in range(max_iter):
        T = torch.zeros_like(u)
        for each in U:
            theta = torch.arccos((each * u).sum().clamp(-1, 1))
            T += theta / torch.sin(theta) * (each - torch.cos(theta) * u) / len(U)
        if T.norm() < tol:
            break
        u = torch.cos(T.norm()) * u + torch.sin(T.norm()) * T / T.norm()
    return u * sum(x.norm() for x in W) / len(W)


def task_arithmetic(W, B, weight, normalize, lambda_):
    total = sum(w * (x - B) for w, x in zip(weight, W))
    return B + lambda_ * (total / sum(weight) if normalize else total)


def kept(size, k):
    """Mask of the k largest; of equal ones the first in the order of the flat index."""
    order = sorted(range(size.numel()), key=lambda i: (-size.flatten()[i].item(), i))
    mask = torch.zeros(size.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.view(size.shape)


def add_up(B, deltas, weight, normalize, lambda_, consensus):
    weighted = [w * d for w, d in zip(weight, deltas)]
    if not consensus:
        total = sum(weighted)
        return B + lambda_ * (total / sum(weight) if normalize else total)
    sign = torch.where(sum(weighted) >= 0, 1.0, -1.0)
    agree = [torch.sign(d) == sign for d in weighted]
    total = sum(d * a for d, a in zip(weighted, agree))
    if normalize:
        divisor = sum(w * a for w, a in zip(weight, agree))
        total = torch.where(divisor == 0, total, total / torch.where(divisor == 0, 1, divisor))
    return B + lambda_ * total


def ties(W, B, weight, density, normalize, lambda_):
    deltas = [x - B for x in W]
    deltas = [d * kept(d.abs(), max(1, int(p * d.numel()))) for d, p in zip(deltas, density)]
    return add_up(B, deltas, weight, normalize, lambda_, True)


def crumbs(W, B, weight, density, gamma, normalize, lambda_, consensus):
    deltas = []
    for x, p, g in zip(W, density, gamma):
        d, n = x - B, B.numel()
        keep = int(p * n)
        drop = min(int(g * n), n - keep)
        deltas.append(d * (kept(d.abs(), drop + keep) & ~kept(d.abs(), drop)))
    return add_up(B, deltas, weight, normalize, lambda_, consensus)


def breadcrumbs(W, B, **p):
    return crumbs(W, B, **p, consensus=False)


def breadcrumbs_ties(W, B, **p):
    return crumbs(W, B, **p, consensus=True)


def sce(W, B, select_topk):
    deltas = [x - B for x in W]
    variance = torch.stack(deltas).var(0, unbiased=False)
    if select_topk < 1:
        mask = kept(variance, max(1, int(select_topk * (variance > 0).sum())))
        deltas = [d * mask for d in deltas]
    energy = [(d**2).mean() for d in deltas]
    weight = [float(e / sum(energy)) for e in energy]
    sign = torch.where(sum(deltas) >= 0, 1.0, -1.0)
    agree = [torch.sign(d) == sign for d in deltas]
    divisor = sum(w * a for w, a in zip(weight, agree))
    total = sum(w * d * a for w, d, a in zip(weight, deltas, agree))
    return B + torch.where(divisor == 0, 0, total / torch.where(divisor == 0, 1, divisor))


def model_stock(W, B, filter_wise):
    n = len(W)

    def ratio(deltas):
        pairs = [(i, j) for i in range(n) for j in range(i)]
        c = sum((deltas[i] / deltas[i].norm()) @ (deltas[j] / deltas[j].norm()) for i, j in pairs) / len(pairs)
        return n * c / (1 + (n - 1) * c)

    deltas = [x - B for x in W]
    if filter_wise:
        t = torch.stack([ratio([d[row] for d in deltas]) for row in range(len(B))])[:, None]
    else:
        t = ratio([d.flatten() for d in deltas])
    return t * sum(W) / n + (1 - t) * B


def nearswap(W, B, t):
    w = torch.where(W[0] == B, 1, (t / (B - W[0]).abs()).clamp(0, 1))
    return w * W[0] + (1 - w) * B


def arcee_fusion(W, B):
    importance = []
    for x, b in zip(W[0], B):
        p, q = torch.softmax(x, 0), torch.softmax(b, 0)
        importance.append((x - b).abs() * (p * (p.log() - q.log())).sum())
    importance = torch.stack(importance)
    ordered = importance.flatten().sort().values

    def quantile(q):
        at = q * (len(ordered) - 1)
        low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
        return low + (high - low) * (at - math.floor(at))

    threshold = quantile(0.5) + 1.5 * (quantile(0.75) - quantile(0.25))
    return torch.where(importance >= threshold, W[0], B)


def ram(W, B, epsilon):
    return ramplus_tl(W, B, epsilon, 0.0, 0.0)


def ramplus_tl(W, B, epsilon, r, alpha):
    deltas = [x - B for x in W]
    touched = [d.abs() > epsilon for d in deltas]
    count = sum(m.long() for m in touched)
    result = B.clone()
    for d, m in zip(deltas, touched):
        rho = (m & (count > 1)).sum() / max(1, int((m & (count == 1)).sum()))
        result += torch.where(m & (count == 1), d * (1 + r * min(max(rho, 0), alpha)), 0)
        result += torch.where(m & (count > 1), d / count.clamp_min(1), 0)
    return result


def passthrough(W, B, scale):
    return W[0] * scale[0]


def interpolate(W, B, t):
    return (1 - t) * B + t * W[0]


def mean(W, B):
    return sum(W) / len(W)
