// One clock draws both videos, so that they cannot drift and a step is exactly one frame. The server
// stores all answers; this page holds only what it shows.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const setup = JSON.parse(document.body.dataset.setup);
  const { fps, segments } = setup;
  const count = segments[segments.length - 1][1];
  const SIDES = ["left", "right"];
  const SPEEDS = [0.1, 0.25, 0.5, 1, 2, 4];
  const HOLD = 0.3; // seconds on a loop's last frame, so that its seam does not look like a flaw
  const GUARD = 250; // ms after the picture changed in which answers are ignored as accidental
  const FLASH = 140; // ms that an answer is shown before the next segment
  const LOADS = 2; // concurrent fetches of sheets; answers need one of the browser's few connections
  const WORDS = { left: "left", right: "right", tie: "tie", skip: "skipped" };
  const SIGNS = { left: "←", right: "→", tie: "=", skip: "–" };
  const screens = ["start", "work", "summary", "ended"];

  let rater = "";
  let view = null;
  let segment = 0; // the current one
  let busy = false;
  let changed = 0; // when the picture last changed
  let shown = null; // the pair on the canvases
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  let speed = SPEEDS.indexOf(1);
  let whole = false;
  let position = 0; // in frames, from the start of the clip
  let before = 0; // time of the last tick

  // --- requests ------------------------------------------------------------------------------

  class Refused extends Error {}

  async function ask(path, message) {
    const options = message
      ? { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(message) }
      : {};
    let response;
    try {
      response = await fetch(path, options);
    } catch {
      throw new Refused("The server does not respond. All earlier answers are saved; run the command again and open its new link.");
    }
    if (response.ok) return response;
    const text = await response.text();
    let reason = text;
    try { reason = JSON.parse(text).error; } catch { /* plain text */ }
    throw new Refused(reason);
  }
  const query = () => `rater=${encodeURIComponent(rater)}`;

  // Shows an error; anything but a refusal is a defect and also goes to the console.
  function complain(error, prefix = "") {
    notice(prefix + error.message, true);
    if (!(error instanceof Refused)) throw error;
  }

  // --- sheets --------------------------------------------------------------------------------

  const sheets = new Map(); // pair -> { left: [bitmap], right: [bitmap], failed }
  const waiting = [];
  let loads = 0;

  function want(pair, now) {
    if (sheets.has(pair) && !sheets.get(pair).failed) return;
    const sheet = { left: [], right: [], failed: null };
    sheets.set(pair, sheet);
    const jobs = segments.flatMap((_, index) => SIDES.map((side) => ({ pair, index, side, sheet })));
    if (now) waiting.unshift(...jobs);
    else waiting.push(...jobs);
    load();
  }

  function load() {
    while (loads < LOADS && waiting.length) {
      const job = waiting.shift();
      if (sheets.get(job.pair) !== job.sheet) continue;
      loads += 1;
      fetchSheet(job).catch((error) => { job.sheet.failed = error; }).finally(() => {
        loads -= 1;
        load();
        arrived(job.pair);
      });
    }
  }

  async function fetchSheet({ pair, index, side, sheet }) {
    const response = await ask(`sheet/${pair}/${index}/${side}.png?${query()}`);
    const bitmap = await createImageBitmap(await response.blob(), { colorSpaceConversion: "none" });
    if (sheets.get(pair) === sheet) sheet[side][index] = bitmap;
    else bitmap.close();
  }

  function forget(kept) {
    for (const [pair, sheet] of sheets) {
      if (kept.has(pair)) continue;
      sheets.delete(pair);
      for (const bitmap of [...sheet.left, ...sheet.right]) bitmap?.close();
    }
  }

  const ready = (pair, index) => SIDES.every((side) => sheets.get(pair)?.[side][index]);

  function arrived(pair) {
    if (!view?.current || view.current.pair !== pair) return;
    const { failed } = sheets.get(pair) ?? {};
    if (failed) complain(failed, "This pair cannot be shown: ");
    else if (ready(pair, segment)) reveal();
  }

  // --- drawing -------------------------------------------------------------------------------

  const canvases = SIDES.map((side) => $(side).querySelector("canvas"));
  const contexts = canvases.map((canvas) => canvas.getContext("2d", { alpha: false }));
  const columns = (frames) => Math.ceil(Math.sqrt(frames)); // the server's layout
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const range = () => (whole ? [0, count] : segments[segment]);
  const frameNow = () => clamp(Math.floor(position + 1e-6), 0, count - 1);
  let drawn = "";

  function draw() {
    const frame = frameNow();
    const index = segments.findIndex(([start, stop]) => start <= frame && frame < stop);
    const key = `${shown} ${frame}`;
    if (key !== drawn && ready(shown, index)) {
      const [start, stop] = segments[index];
      const wide = columns(stop - start);
      const rows = Math.ceil((stop - start) / wide);
      SIDES.forEach((side, number) => {
        const sheet = sheets.get(shown)[side][index];
        const [width, height] = [sheet.width / wide, sheet.height / rows];
        const cell = frame - start;
        const [x, y] = [(cell % wide) * width, Math.floor(cell / wide) * height];
        const canvas = canvases[number];
        if (canvas.width !== width || canvas.height !== height) {
          [canvas.width, canvas.height] = [width, height];
          fit();
        }
        contexts[number].drawImage(sheet, x, y, width, height, 0, 0, width, height);
      });
      drawn = key;
      document.body.dataset.frame = frame; // the frame on both canvases
    }
    $("frame").firstElementChild.textContent = frame + 1;
    $("head").style.setProperty("--at", frame);
    $("stage").classList.toggle("outside", index !== segment);
  }

  // The largest size that fits; small videos are scaled by whole numbers, so that pixels are square.
  function fit() {
    const { width, height } = canvases[0];
    const box = $("left").getBoundingClientRect();
    const dots = devicePixelRatio;
    let scale = Math.min((box.width * dots) / width, (box.height * dots) / height);
    const crisp = scale >= 2;
    if (crisp) scale = Math.floor(scale);
    for (const canvas of canvases) {
      canvas.classList.toggle("crisp", crisp);
      canvas.style.width = `${(width * scale) / dots}px`;
      canvas.style.height = `${(height * scale) / dots}px`;
    }
  }
  new ResizeObserver(fit).observe($("left"));

  function tick(now) {
    const passed = Math.min(now - before, 250) / 1000; // a hidden tab does not tick
    before = now;
    if (shown === null || $("work").hidden) return void requestAnimationFrame(tick);
    const [start, stop] = range();
    const held = HOLD * fps * SPEEDS[speed]; // the hold in frames
    if (playing) {
      position += passed * fps * SPEEDS[speed];
      if (position >= stop + held || position < start) position = start;
      const at = position;
      position = Math.min(position, stop - 1e-3);
      draw();
      position = at;
    } else {
      draw();
    }
    requestAnimationFrame(tick);
  }
  requestAnimationFrame(tick);

  // --- playback ------------------------------------------------------------------------------

  function setPlaying(run) {
    playing = run;
    if (!run) position = Math.min(Math.floor(position), range()[1] - 1) + 0.5;
    showControls();
  }

  function seek(frame) {
    setPlaying(false);
    position = frame + 0.5; // its middle, so that rounding cannot reach a neighbour
  }

  function step(by) {
    const [start, stop] = range();
    const frame = Math.min(frameNow(), stop - 1) + by;
    seek(frame < start ? stop - 1 : frame >= stop ? start : frame);
  }

  function setSpeed(by) {
    speed = clamp(speed + by, 0, SPEEDS.length - 1);
    showControls();
  }

  function setWhole(on) {
    whole = on;
    position = range()[0] + (playing ? 0 : 0.5);
    showControls();
  }

  function showControls() {
    $("play").lastElementChild.textContent = playing ? "Pause" : "Play";
    $("speed").textContent = `${SPEEDS[speed]}×`;
    $("slower").disabled = speed === 0;
    $("faster").disabled = speed === SPEEDS.length - 1;
    $("whole").setAttribute("aria-pressed", String(whole));
  }

  // --- screens -------------------------------------------------------------------------------

  function screen(name) {
    for (const id of screens) $(id).hidden = id !== name;
  }

  function notice(text, wrong = false) {
    const changes = $("notice").textContent !== text;
    if (changes) $("notice").textContent = text;
    $("notice").classList.toggle("wrong", wrong);
    $("notice").hidden = !text;
  }

  const say = (text) => { $("said").textContent = text; };

  function duration(hours) {
    if (hours < 1) return `${Math.max(1, Math.round(hours * 60))} min`;
    return `${hours.toFixed(1)} h`;
  }

  const list = $("segments");
  segments.forEach(([start, stop], index) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    item.style.setProperty("--length", stop - start);
    button.addEventListener("click", () => { judge(index); button.blur(); });
    item.append(button);
    list.append(item);
  });
  $("frames").textContent = count;
  $("head").style.setProperty("--frame", `${100 / count}%`);

  function showSegments() {
    [...list.querySelectorAll("button")].forEach((button, index) => {
      const answer = view.current.answers[index];
      const name = segments.length > 8 ? index + 1 : `segment ${index + 1}`;
      button.textContent = answer ? `${index + 1} ${SIGNS[answer]}` : name;
      button.classList.toggle("given", Boolean(answer));
      button.setAttribute("aria-label", `Segment ${index + 1}: ${answer ? WORDS[answer] : "open"}`);
      if (index === segment) button.setAttribute("aria-current", "step");
      else button.removeAttribute("aria-current");
    });
  }

  function judge(index) {
    segment = index;
    const [start, stop] = segments[index];
    if (!whole || !(start <= frameNow() && frameNow() < stop)) position = start + (playing ? 0 : 0.5);
    changed = performance.now();
    showSegments();
  }

  function reveal() {
    const { pair } = view.current;
    if (shown !== pair) {
      shown = pair;
      drawn = "";
      position = range()[0] + (playing ? 0 : 0.5);
      changed = performance.now();
    }
    $("stage").classList.remove("loading");
    document.body.dataset.pair = pair;
    notice("");
  }

  function show(next) {
    view = next;
    const { current, finished, total, pace } = view;
    $("number").textContent = finished;
    $("total").textContent = total;
    $("progress").max = Math.max(total, 1);
    $("progress").value = finished;
    $("pace").textContent = pace ? `${Math.round(pace)} pairs/h, about ${duration((total - finished) / pace)} left` : "";
    $("rater").textContent = rater;
    for (const id of ["undo", "undo-last"]) $(id).disabled = !view.undoable;
    const keep = new Set([shown, current?.pair, ...view.ahead]);
    forget(keep);
    if (!current) {
      document.body.dataset.pair = "";
      return showSummary();
    }
    screen("work");
    $("prompt").textContent = current.prompt;
    $("prompt").title = current.prompt;
    judge(Math.max(0, current.answers.indexOf(null)));
    want(current.pair, true);
    for (const pair of view.ahead) want(pair, false);
    if (ready(current.pair, segment)) reveal();
    else {
      $("stage").classList.add("loading");
      notice("Loading…");
    }
  }

  function percent(share) {
    return share === null ? "–" : `${Math.round(100 * share)}%`;
  }

  function row(...cells) {
    const line = document.createElement("tr");
    for (const [text, name] of cells) {
      const cell = document.createElement("td");
      if (name) cell.className = name;
      if (text instanceof Node) cell.append(text);
      else cell.textContent = text;
      line.append(cell);
    }
    return line;
  }

  // Landis and Koch 1977
  function strength(kappa) {
    if (kappa === null) return "–";
    const words = [[0, "none"], [0.2, "slight"], [0.4, "fair"], [0.6, "moderate"], [0.8, "substantial"], [1, "almost perfect"]];
    return `${kappa.toFixed(2)} (${words.find(([limit]) => kappa <= limit)[1]})`;
  }

  async function showSummary() {
    const done = !view.current;
    screen("summary");
    $("resume").hidden = done;
    $("verdict").textContent = done ? `All ${view.total} pairs are labelled. Thank you, ${rater}.` : `${view.finished} of ${view.total} pairs, ${rater}`;
    $("verdict").focus();
    let summary;
    try {
      summary = await (await ask(`summary?${query()}`)).json();
    } catch (error) {
      $("figures").textContent = error.message;
      return;
    }
    const pace = summary.pace ? `, at ${Math.round(summary.pace)} pairs per hour` : "";
    $("figures").textContent = `${Math.round(summary.minutes)} min of work in this session${pace}. Everything is saved.`;
    const most = Math.max(1, ...Object.values(summary.answers));
    $("counts").tBodies[0].replaceChildren(...Object.entries(summary.answers).map(([answer, n]) => {
      const bar = document.createElement("span");
      bar.style.width = `${(100 * n) / most}%`;
      return row([`${SIGNS[answer]} ${WORDS[answer]}`], [n, "number"], [bar, "bar"]);
    }));
    $("others").tBodies[0].replaceChildren(...summary.others.map(({ rater: name, agreement }) =>
      row([name], [agreement.segments, "number"], [percent(agreement.share), "number"], [strength(agreement.kappa), "number"])));
    $("others").hidden = !summary.others.length;
    $("alone").hidden = Boolean(summary.others.length);
  }

  // --- answers -------------------------------------------------------------------------------

  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

  // One change at a time: the next question is shown once the server has saved the answer.
  async function change(path, message, shownFor = 0) {
    if (busy) return false;
    busy = true;
    try {
      const [response] = await Promise.all([ask(path, { rater, ...message }), pause(shownFor)]);
      show(await response.json());
      return true;
    } catch (error) {
      complain(error, "Not saved: ");
      return false;
    } finally {
      busy = false;
    }
  }

  async function answer(given, rest = false) {
    const loaded = view.current.pair === shown && !$("stage").classList.contains("loading");
    // A pair that cannot be shown can only be skipped.
    if (busy || (!loaded && given !== "skip") || performance.now() - changed < GUARD) return;
    const marked = [document.querySelector(`[data-answer="${given}"]`), SIDES.includes(given) ? $(given) : null];
    marked[0].classList.add("pressed");
    marked[1]?.classList.add("chosen");
    const what = `Pair ${view.finished + 1}, segment ${segment + 1}: ${WORDS[given]}.`;
    const saved = await change("answer", { pair: view.current.pair, segment, answer: given, rest }, FLASH);
    marked[0].classList.remove("pressed");
    marked[1]?.classList.remove("chosen");
    if (saved) say(`${what} Saved.`);
  }

  async function undo() {
    if (view.undoable && await change("undo", { revision: view.revision })) say("Undone.");
  }

  // --- keys and buttons ----------------------------------------------------------------------

  const atWork = {
    ArrowLeft: () => answer("left"), 1: () => answer("left"),
    ArrowRight: () => answer("right"), 2: () => answer("right"),
    ArrowDown: () => answer("tie"), 0: () => answer("tie"),
    s: () => answer("skip"), S: () => answer("skip", true),
    u: undo, Backspace: undo,
    " ": () => setPlaying(!playing),
    w: () => setWhole(!whole),
    i: () => { if (!busy) showSummary(); },
  };
  const repeating = { // these repeat while held down
    ",": () => step(-1), ".": () => step(1),
    "-": () => setSpeed(-1), "+": () => setSpeed(1), "=": () => setSpeed(1),
  };
  const atSummary = { Escape: resume, i: resume, u: undo, Backspace: undo };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const lower = event.key.length === 1 && event.key !== "S" ? event.key.toLowerCase() : event.key;
    let action;
    if (!$("work").hidden) action = repeating[lower] ?? atWork[lower];
    else if (!$("summary").hidden) action = atSummary[lower];
    if (!action) return;
    event.preventDefault();
    if (!event.repeat || lower in repeating) action();
  });

  function resume() {
    if (view?.current && !busy) show(view);
  }

  function press(id, action) {
    $(id).addEventListener("click", (event) => {
      action();
      // A clicked button would keep the focus ring; after a key press the focus stays on purpose.
      if (event.detail) event.currentTarget.blur();
    });
  }
  press("undo", undo);
  press("undo-last", undo);
  press("play", () => setPlaying(!playing));
  press("back", () => step(-1));
  press("forward", () => step(1));
  press("slower", () => setSpeed(-1));
  press("faster", () => setSpeed(1));
  press("whole", () => setWhole(!whole));
  press("pause", () => { if (!busy) showSummary(); });
  press("resume", resume);
  press("another", () => { location.hash = ""; });
  press("end", async () => {
    try {
      await ask("end", { rater });
      screen("ended");
      $("ended").querySelector("h1").focus();
    } catch (error) {
      $("figures").textContent = error.message;
    }
  });
  for (const button of document.querySelectorAll("[data-answer]")) {
    button.addEventListener("click", (event) => {
      answer(button.dataset.answer, event.shiftKey && button.dataset.answer === "skip");
      if (event.detail) button.blur();
    });
  }

  function scrub(event) {
    const box = $("track").getBoundingClientRect();
    const frame = clamp(Math.floor(((event.clientX - box.left) / box.width) * count), 0, count - 1);
    const [start, stop] = range();
    if (frame < start || frame >= stop) setWhole(true);
    seek(frame);
  }
  $("track").addEventListener("pointerdown", (event) => {
    $("track").setPointerCapture(event.pointerId);
    scrub(event);
  });
  $("track").addEventListener("pointermove", (event) => {
    if ($("track").hasPointerCapture(event.pointerId)) scrub(event);
  });

  // --- raters --------------------------------------------------------------------------------

  // The name is part of the address, so that a reload keeps it and two tabs can have two raters.
  const named = () => new URLSearchParams(location.hash.slice(1)).get("rater") ?? "";
  const enter = (name) => { location.hash = new URLSearchParams({ rater: name }); };

  function greet() {
    screen("start");
    const raters = Object.entries(setup.raters);
    $("name").value = rater || (raters.length ? "" : setup.suggested);
    $("raters").hidden = !raters.length;
    if (raters.length) {
      $("raters").replaceChildren("Resume as ", ...raters.map(([name, finished]) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = `${name} (${finished} of ${setup.total})`;
        button.addEventListener("click", () => enter(name));
        return button;
      }));
    }
    $("name").focus();
    $("name").select();
  }

  async function arrive() {
    if (busy) return;
    const name = named();
    forget(new Set()); // another rater has other sides
    shown = null;
    if (!name) return greet();
    rater = name;
    if (!(rater in setup.raters)) setup.raters[rater] = 0;
    say("");
    notice("");
    try {
      show(await (await ask(`view?${query()}`)).json());
    } catch (error) {
      screen("work");
      complain(error);
    }
  }
  addEventListener("hashchange", arrive);
  $("who").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = $("name").value.trim();
    if (name) enter(name);
  });

  showControls();
  arrive();
})();
