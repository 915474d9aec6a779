// A recording or the microphone -> windows of the model's length -> labels, all in this browser.
//
// The windows, and the mean over them, are those of the Python pipeline: each as long as the model,
// overlapping by half; less than 10 ms beyond a window belongs to it; each counts by its length.

const SHOWN_LABELS = 5;
const element = (id) => document.getElementById(id);

const model = await (await fetch("model.json")).json(); // labels, samplingRate, windowSamples
const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map(); // id -> [resolve, reject]
let nextId = 0;
let listening = null; // stops the microphone

worker.onmessage = ({ data }) => {
  if (data.ready) return ready();
  if (data.id === undefined) return say(data.error, true);
  const [resolve, reject] = waiting.get(data.id);
  waiting.delete(data.id);
  data.error ? reject(new Error(data.error)) : resolve(data);
};

function ready() {
  element("file").disabled = element("microphone").disabled = false;
  element("choose").classList.remove("disabled");
  const shown = model.labels.slice(0, 10).map(plain).join(", ");
  const more = model.labels.length > 10 ? `, … ${model.labels.length} in all` : "";
  element("about").textContent = `${model.name} knows: ${shown}${more}.`;
  document.body.dataset.state = "ready";
}

/** One window, at most as long as the model's, to its scores. */
export function classifyWindow(waveform) {
  const id = nextId++;
  return new Promise((resolve, reject) => {
    waiting.set(id, [resolve, reject]);
    worker.postMessage({ id, waveform });
  });
}

/** [start, end] of each window, in samples. */
export function cutWindows(length) {
  const { windowSamples, samplingRate } = model;
  const hop = Math.floor(windowSamples / 2);
  const shortestRest = Math.floor(samplingRate / 100);
  const windows = [];
  let start = 0;
  while (length - start >= windowSamples + shortestRest) {
    windows.push([start, start + windowSamples]);
    start += hop;
  }
  windows.push([start, length]);
  return windows;
}

/** A file's bytes -> mono samples at the model's rate. */
export async function decode(bytes) {
  const context = new OfflineAudioContext(1, 1, model.samplingRate);
  const sound = await context.decodeAudioData(bytes);
  const mono = new Float32Array(sound.length);
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    const samples = sound.getChannelData(channel);
    for (let i = 0; i < mono.length; i++) mono[i] += samples[i] / sound.numberOfChannels;
  }
  return mono;
}

/** Samples -> {probabilities, windows: [{start, end, probabilities, logits}]}, times in seconds. */
export async function classify(waveform, progress = () => {}) {
  const spans = cutWindows(waveform.length);
  const mean = new Float64Array(model.labels.length);
  const windows = [];
  for (const [start, end] of spans) {
    const { probabilities, logits } = await classifyWindow(waveform.slice(start, end));
    probabilities.forEach((p, i) => (mean[i] += p * (end - start)));
    const seconds = { start: start / model.samplingRate, end: end / model.samplingRate };
    windows.push({ ...seconds, probabilities, logits });
    progress(windows.length / spans.length);
  }
  const total = spans.reduce((sum, [start, end]) => sum + end - start, 0);
  return { probabilities: mean.map((sum) => sum / total), windows };
}

function best(probabilities, count) {
  return [...probabilities.keys()]
    .sort((a, b) => probabilities[b] - probabilities[a])
    .slice(0, count)
    .map((i) => ({ label: model.labels[i], score: probabilities[i] }));
}

function plain(label) {
  return label.replaceAll("_", " ");
}

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").className = isError ? "error" : "";
}

function cell(row, text, className = "") {
  const made = row.insertCell();
  made.textContent = text;
  made.className = className;
  return made;
}

function showLabels(probabilities) {
  const body = element("labels").tBodies[0];
  body.replaceChildren();
  for (const { label, score } of best(probabilities, SHOWN_LABELS)) {
    const row = body.insertRow();
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.width = `${100 * score}%`;
    cell(row, plain(label)).append(bar);
    cell(row, `${(100 * score).toFixed(1)} %`, "number");
  }
  element("labels").hidden = false;
}

function showWindow({ start, end, probabilities }) {
  const [{ label, score }] = best(probabilities, 1);
  const row = element("windows").tBodies[0].insertRow();
  row.dataset.start = start;
  cell(row, `${start.toFixed(1)} – ${end.toFixed(1)} s`);
  cell(row, plain(label));
  cell(row, `${(100 * score).toFixed(1)} %`, "number");
  row.onclick = () => {
    element("player").currentTime = start;
    element("player").play();
  };
}

element("file").onchange = async ({ target }) => {
  const [file] = target.files;
  if (!file) return;
  listening?.();
  document.body.dataset.state = "busy";
  element("windows").hidden = element("labels").hidden = true;
  element("windows").tBodies[0].replaceChildren();
  try {
    say(`Reading ${file.name} …`);
    const waveform = await decode(await file.arrayBuffer());
    if (!waveform.length) throw new Error("it holds no sound");
    URL.revokeObjectURL(element("player").src);
    element("player").src = URL.createObjectURL(file);
    element("player").hidden = false;
    const begun = performance.now();
    const answer = await classify(waveform, (done) =>
      say(`${file.name}: ${Math.round(100 * done)} %`),
    );
    showLabels(answer.probabilities);
    answer.windows.forEach(showWindow);
    element("windows").hidden = answer.windows.length < 2;
    const seconds = waveform.length / model.samplingRate;
    const taken = (performance.now() - begun) / 1000;
    say(`${file.name}: ${seconds.toFixed(1)} s of sound, ${(seconds / taken).toFixed(0)} × real time`);
  } catch (error) {
    say(`${file.name} cannot be read: ${error.message}. Try a WAV, MP3 or Ogg file.`, true);
  }
  document.body.dataset.state = "done";
  target.value = ""; // so that the same file can be chosen again
};

element("microphone").onclick = async () => {
  if (listening) return listening();
  try {
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
    const context = new AudioContext({ sampleRate: model.samplingRate });
    await context.audioWorklet.addModule("recorder.js");
    const source = context.createMediaStreamSource(stream);
    const recorder = new AudioWorkletNode(context, "recorder");
    source.connect(recorder);
    const recent = new Float32Array(model.windowSamples); // a ring: the newest window's worth
    let heard = 0;
    let busy = false;
    recorder.port.onmessage = async ({ data }) => {
      recent.copyWithin(0, data.length);
      recent.set(data, recent.length - data.length);
      heard += data.length;
      if (busy) return; // a slow machine answers less often, but never falls behind
      busy = true;
      const samples = recent.slice(Math.max(0, recent.length - heard));
      const { probabilities } = await classifyWindow(samples);
      busy = false;
      if (listening) showLabels(probabilities);
    };
    listening = () => {
      stream.getTracks().forEach((track) => track.stop());
      context.close();
      listening = null;
      element("microphone").textContent = "Listen to the microphone";
      say("Stopped.");
    };
    element("microphone").textContent = "Stop listening";
    element("player").hidden = element("windows").hidden = true;
    say("Listening …");
  } catch (error) {
    say(`The microphone cannot be used: ${error.message}`, true);
  }
};
