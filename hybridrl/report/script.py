"""The script of the page, which shows the values under the pointer. The page works without it."""

SCRIPT = """
'use strict';
(() => {
  const write = (unit, value) =>
    unit === 'share' ? (100 * value).toFixed(1) + ' %'
    : Number(value.toPrecision(4)).toLocaleString('en', {maximumSignificantDigits: 4})
      + (unit === 'seconds' ? ' s' : '');
  const space = document.querySelector('.plot svg')?.namespaceURI;
  const element = (name, attributes) => {
    const made = document.createElementNS(space, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    return made;
  };
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  for (const plot of document.querySelectorAll('.plot')) {
    const svg = plot.querySelector('svg');
    const data = JSON.parse(plot.querySelector('script').textContent);
    const tip = plot.querySelector('.tip');
    const [left, right, top, bottom] = data.frame;
    const scale = (v) => data.log ? Math.log(v) : v;
    const toX = (x) => left + (x - data.x[0]) / (data.x[1] - data.x[0]) * (right - left);
    const toY = (y) => bottom - (scale(y) - scale(data.y[0]))
      / (scale(data.y[1]) - scale(data.y[0])) * (bottom - top);
    const stops = [...new Set(data.curves.flatMap((c) => c.x))].sort((a, b) => a - b);
    const marks = element('g', {class: 'marks'});
    svg.append(marks);
    let stop = -1;
    const hide = () => { stop = -1; tip.hidden = true; marks.replaceChildren(); };
    const show = (number) => {
      stop = Math.max(0, Math.min(stops.length - 1, number));
      const x = stops[stop];
      const reach = 0.02 * (data.x[1] - data.x[0]);
      marks.replaceChildren(element('path', {class: 'rule', d: `M${toX(x)} ${top}V${bottom}`}));
      const head = document.createElement('b');
      head.textContent = data.x_label + ' ' + Number(x.toPrecision(5)).toLocaleString('en');
      tip.replaceChildren(head);
      let total = 0;
      for (const curve of data.curves) {
        const at = nearest(curve.x, x);
        if (Math.abs(curve.x[at] - x) > reach) continue;
        total += curve.y[at];
        const row = document.createElement('div');
        const swatch = document.createElement('i');
        swatch.style.background = curve.colour;
        const value = document.createElement('span');
        let text = write(data.unit, curve.y[at]);
        if (curve.low && curve.low[at] !== null) {
          text += ' (' + write(data.unit, curve.low[at]) + ' to '
            + write(data.unit, curve.high[at]) + ')';
        }
        value.textContent = text;
        row.append(swatch, curve.label + '  ', value);
        tip.append(row);
        if (!data.stacked) {
          marks.append(element('circle', {cx: toX(curve.x[at]), cy: toY(curve.y[at]), r: 5,
            fill: curve.colour, stroke: '#fff', 'stroke-width': 2}));
        }
      }
      if (data.stacked) {
        const row = document.createElement('div');
        row.textContent = 'total  ' + write(data.unit, total);
        tip.append(row);
      }
      tip.hidden = false;
      const width = plot.clientWidth;
      const place = toX(x) / svg.viewBox.baseVal.width * width;
      const onLeft = place > width / 2;
      tip.style.left = onLeft ? 'auto' : `${place + 12}px`;
      tip.style.right = onLeft ? `${width - place + 12}px` : 'auto';
    };
    const follow = (event) => {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      show(nearest(stops, data.x[0] + (at - left) / (right - left) * (data.x[1] - data.x[0])));
    };
    svg.addEventListener('pointermove', follow);
    svg.addEventListener('pointerdown', follow);
    svg.addEventListener('pointerleave', hide);
    svg.addEventListener('blur', hide);
    svg.addEventListener('keydown', (event) => {
      const to = {ArrowRight: stop + 1, ArrowLeft: stop < 0 ? stops.length - 1 : stop - 1,
        Home: 0, End: stops.length - 1}[event.key];
      if (event.key === 'Escape') hide();
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
  }
})();
"""
