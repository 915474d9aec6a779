// Runs the model, away from the page, so that the page never freezes.
//
//   {waveform: Float32Array}  ->  {logits: Float32Array, probabilities: Float32Array}
import * as ort from "./ort/ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1; // more need headers that static hosts do not send
ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;

const session = ort.InferenceSession.create(new URL("./model.onnx", import.meta.url).href, {
  executionProviders: ["wasm"],
});
session.then(
  () => postMessage({ ready: true }),
  (error) => postMessage({ error: `The model cannot be loaded: ${error.message}` }),
);

onmessage = async ({ data }) => {
  try {
    const waveform = new ort.Tensor("float32", data.waveform, [1, data.waveform.length]);
    const outputs = await (await session).run({ waveform });
    postMessage({
      id: data.id,
      logits: outputs.logits.data,
      probabilities: outputs.probabilities.data,
    });
  } catch (error) {
    postMessage({ id: data.id, error: error.message });
  }
};
