// Labels that images teach: the computation of clip_rd_edge/runtime/taught.py, whose heading has the method.

const TEXT_SHARES = [1, 0.5, 0];
const BOOSTS = [0, 2, 4, 8, 16];
const RIDGES = [0.1, 0.3, 1];
const SINGLE = { share: 0.5, boost: 16, ridge: 0.3 }; // with one image of each label
const [THRESHOLD, UNSEEN] = [0.4, 0.54];

// The rows of all labels, of one entry more than an embedding, which is added to the cosine.
// images: embeddings by taught label; none: those of images of nothing; texts: those of all labels, in their order.
// The kernel's form of the regression: its matrix has the size of the images, which are few in a browser.
export function taughtRows({ images, none, texts, scale, bias }) {
  const taught = Object.keys(images);
  const beside = [...texts.keys()].filter((label) => !images[label]).map((label) => texts.get(label));
  const known = [none, ...taught.map((label) => images[label])];
  const rows = known.flatMap((list) => list.map(normalised));
  const classes = known.flatMap((list, i) => list.map(() => i - 1));
  const roots = known.flatMap((list) => list.map(() => Math.sqrt(rows.length / known.length / list.length)));
  const own = taught.map((label) => texts.get(label));
  const middle = own[0].map((_, i) => own.reduce((sum, text) => sum + text[i], 0) / own.length);
  const judged = [...rows.keys()].filter((i) => classes[i] >= 0 && known[classes[i] + 1].length > 1);
  const byTexts = judged.map((i) => ({
    texts: own.map((text) => scale * dot(rows[i], text)),
    level: scale * dot(rows[i], middle),
    beside: beside.map((text) => scale * dot(rows[i], text)),
    weight: roots[i] ** 2,
    label: classes[i],
  }));
  const kernel = rows.map((a, i) => rows.map((b, j) => roots[i] * roots[j] * dot(a, b)));
  let best = null;
  for (const ridge of judged.length ? RIDGES : [SINGLE.ridge]) {
    const inverse = inverted(kernel.map((row, i) => row.map((value, j) => value + (i === j ? ridge : 0))));
    const shares = inverse.map((row) => taught.map((_, c) => row.reduce((sum, value, j) => sum + (classes[j] === c ? value * roots[j] : 0), 0)));
    const left = judged.map((i) => shares[i].map((share, c) => (classes[i] === c) - share / (inverse[i][i] * roots[i])));
    const found = judged.length ? bestMix(byTexts, left, bias) : { ...SINGLE, threshold: THRESHOLD * UNSEEN, loss: 0 };
    if (!best || found.loss < best.loss) best = { ...found, shares };
  }
  const { share, boost, threshold, shares } = best;
  const row = (label, c) => {
    const vector = Float64Array.from(texts.get(label), (value, i) => share * value + (1 - share) * middle[i]);
    rows.forEach((image, n) => vector.forEach((_, i) => (vector[i] += (boost / scale) * shares[n][c] * roots[n] * image[i])));
    return [...vector, (-boost * threshold) / scale];
  };
  const learnt = new Map(taught.map((label, c) => [label, row(label, c)]));
  return new Map([...texts].map(([label, text]) => [label, learnt.get(label) ?? [...text, 0]]));
}

// The mix of texts and of what images get while they are left out, by image and label, with the lowest loss.
function bestMix(byTexts, left, bias) {
  const mean = (value) => byTexts.reduce((sum, image, n) => sum + image.weight * value(image, n), 0) / byTexts.reduce((sum, { weight }) => sum + weight, 0);
  const threshold = Math.max(0, THRESHOLD * mean(({ label }, n) => left[n][label]));
  let best = null;
  for (const share of TEXT_SHARES) {
    for (const boost of BOOSTS) {
      const loss = mean(({ texts, level, beside, label }, n) => {
        const logits = texts.map((text, c) => share * text + (1 - share) * level + boost * (left[n][c] - threshold));
        return lossOf([...logits, ...beside], label, bias);
      });
      if (!best || loss < best.loss) best = { loss, share, boost, threshold };
    }
  }
  return best;
}

function lossOf(logits, own, bias) {
  if (bias === undefined) return logSum(logits) - logits[own];
  const wrong = logits.map((logit) => logSum([0, logit + bias]));
  return wrong.reduce((sum, value) => sum + value, 0) - wrong[own] + logSum([0, -logits[own] - bias]);
}

// The logarithm of the sum of exponentials.
export function logSum(values) {
  const max = values.reduce((a, b) => Math.max(a, b), -Infinity);
  return max + Math.log(values.reduce((sum, value) => sum + Math.exp(value - max), 0));
}

// The inverse of a positive definite matrix, in its place, by Gauss and Jordan.
function inverted(matrix) {
  matrix.forEach((pivots, k) => {
    const pivot = 1 / pivots[k];
    pivots[k] = 1;
    pivots.forEach((_, j) => (pivots[j] *= pivot));
    matrix.forEach((row, i) => {
      const factor = row[k];
      if (i === k) return;
      row[k] = 0;
      row.forEach((_, j) => (row[j] -= factor * pivots[j]));
    });
  });
  return matrix;
}

function normalised(row) {
  const norm = Math.sqrt(dot(row, row));
  return Float64Array.from(row, (value) => value / norm);
}

export function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}
