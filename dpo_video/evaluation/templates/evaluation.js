// One clock for all videos. Each video plays on its own and is synchronised with the clock: by its
// playback rate if it is slightly off, by a seek if it is far off. Only videos in view are loaded.
"use strict";
(() => {
  const cards = document.getElementById("cards");
  const play = document.getElementById("play");
  const toggles = document.querySelectorAll("[data-toggle]");
  if (!play) return;
  const slider = document.getElementById("frame");
  const position = document.getElementById("position");
  const speed = document.getElementById("speed");
  const sort = document.getElementById("sort");
  const frames = Number(cards.dataset.frames);
  const fps = Number(cards.dataset.fps);
  const duration = frames / fps;
  const active = new Set();
  let playing = false;
  let rate = 1;
  let offset = 0; // seconds into the loop at `since`
  let since = 0; // milliseconds

  const wrap = (time) => ((time % duration) + duration) % duration;
  const now = () => wrap(playing ? offset + ((performance.now() - since) / 1000) * rate : offset);
  const frame = () => Math.min(frames - 1, Math.floor(now() * fps + 1e-6));

  function hold(video) {
    if (video.readyState < 2 || video.seeking) return;
    const target = now();
    // Seconds ahead of the clock, the shorter way around the loop.
    const ahead = wrap(video.currentTime - target + duration / 2) - duration / 2;
    if (!playing) {
      video.pause();
      if (Math.abs(ahead) > 0.1 / fps) video.currentTime = target;
    } else if (video.paused) {
      video.currentTime = target;
      video.play().catch(() => {});
    } else if (Math.abs(ahead) > Math.max(0.75 / fps, 0.08) * rate) {
      const late = performance.now() - (video.sought || 0) > 400;
      if (late) {
        video.sought = performance.now();
        video.currentTime = target;
      }
    } else {
      video.playbackRate = rate * Math.min(1.2, Math.max(0.8, 1 - 2 * ahead));
    }
  }

  function show() {
    slider.value = String(frame());
    position.textContent = `${frame() + 1} / ${frames}`;
    slider.setAttribute("aria-valuetext", `frame ${frame() + 1} of ${frames}`);
    active.forEach(hold);
  }

  function tick() {
    show();
    if (playing) requestAnimationFrame(tick);
  }

  function set(time, run) {
    offset = wrap(time);
    since = performance.now();
    if (run !== playing) {
      playing = run;
      const word = run ? "Pause" : "Play";
      play.classList.toggle("playing", run);
      for (const button of toggles) {
        if (button === play) button.setAttribute("aria-label", word);
        else button.textContent = word;
      }
      if (run) requestAnimationFrame(tick);
    }
    show();
  }

  // The middle of a frame, so that rounding cannot show the next one.
  const stop = (index) => set((((index + frames) % frames) + 0.5) / fps, false);
  const faster = (by) => {
    const next = speed.selectedIndex + by;
    if (next < 0 || next >= speed.options.length) return;
    speed.selectedIndex = next;
    speed.dispatchEvent(new Event("change"));
  };

  const toggle = () => (playing ? stop(frame()) : set(now(), true));
  for (const button of toggles) button.addEventListener("click", toggle);
  document.getElementById("back").addEventListener("click", () => stop(frame() - 1));
  document.getElementById("forward").addEventListener("click", () => stop(frame() + 1));
  slider.addEventListener("input", () => stop(Number(slider.value)));
  speed.addEventListener("change", () => {
    const time = now();
    rate = Number(speed.value);
    set(time, playing);
  });
  sort.addEventListener("change", () => {
    const [metric, sign] = sort.value ? sort.value.split(" ").map(Number) : [null, 1];
    const key = (card) =>
      metric === null
        ? Number(card.id.split("-")[1])
        : Number(card.dataset.gains.trim().split(" ")[metric]);
    const sorted = [...cards.children].sort((a, b) => sign * (key(a) - key(b)));
    cards.append(...sorted);
  });

  let inView = false;
  new IntersectionObserver((entries) => {
    inView = entries[entries.length - 1].isIntersecting;
  }).observe(cards);
  document.addEventListener("keydown", (event) => {
    if (!inView || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, textarea, button, summary, a")) {
      if (event.target !== slider || event.key !== " ") return;
    }
    const actions = {
      " ": toggle,
      ArrowLeft: () => stop(frame() - 1),
      ArrowRight: () => stop(frame() + 1),
      "[": () => faster(-1),
      "]": () => faster(1),
    };
    if (!(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  });

  // Browsers limit the players per page to some dozens, so videos out of view are unloaded.
  const observer = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting && !active.has(target)) {
          active.add(target);
          const source = target.dataset.copy ? document.querySelector(target.dataset.copy) : target;
          target.src = source.dataset.src;
        } else if (!isIntersecting && active.delete(target)) {
          target.removeAttribute("src");
          target.load();
        }
      }
    },
    { rootMargin: "100px" },
  );
  for (const video of document.querySelectorAll("video")) {
    video.muted = true;
    video.addEventListener("loadeddata", () => {
      const ratio = `${video.videoWidth} / ${video.videoHeight}`;
      document.body.style.setProperty("--aspect", ratio);
      // Small videos are enlarged without smoothing.
      video.classList.toggle("pixels", video.videoWidth <= 160);
      hold(video);
    });
    video.addEventListener("click", toggle);
    video.addEventListener("seeked", () => hold(video));
    observer.observe(video);
  }
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) stop(0);
  else set(0, true);
})();
