// node transformers_js.mjs NODE_MODULES FOLDER REQUEST: print the embeddings of a request's images and texts as JSON.
import { createRequire } from 'node:module';
import { readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';
import path from 'node:path';

const [packages, folder, request] = process.argv.slice(2);
const require = createRequire(path.join(path.resolve(packages), 'package.json'));
const hf = await import(pathToFileURL(require.resolve('@huggingface/transformers')));
const { images, texts, dtype } = JSON.parse(readFileSync(request, 'utf-8'));
hf.env.allowRemoteModels = false;
hf.env.localModelPath = path.dirname(path.resolve(folder));
const name = path.basename(path.resolve(folder)), options = { dtype };

const tokenizer = await hf.AutoTokenizer.from_pretrained(name);
const processor = await hf.AutoProcessor.from_pretrained(name);
const textModel = await hf.CLIPTextModelWithProjection.from_pretrained(name, options);
const visionModel = await hf.CLIPVisionModelWithProjection.from_pretrained(name, options);
const both = await hf.CLIPModel.from_pretrained(name, options);

const textInputs = tokenizer(texts, { padding: true, truncation: true });
const { text_embeds } = await textModel(textInputs);
const image_embeds = [];
for (const file of images) {
    const inputs = await processor(await hf.RawImage.read(file));
    image_embeds.push(...(await visionModel(inputs)).image_embeds.tolist());
}
const pixels = await processor(await hf.RawImage.read(images[0]));
const { logits_per_image } = await both({ ...textInputs, ...pixels });
console.log(JSON.stringify({
    text_embeds: text_embeds.tolist(),
    image_embeds,
    logits_per_image: logits_per_image.tolist(),
}));
