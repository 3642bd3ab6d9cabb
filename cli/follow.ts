/**
 * Shows a run's events while they come: a progress bar on stderr (step, loss, aux loss, tokens/s, time left) and one line
 * for what is worth keeping (phases, evals, checkpoints, faults). Knows the events, not where they come from. Called by
 * `train --follow`, `logs --follow` and `demo`.
 */
import type { RunEvent, StepReport } from '../config/messages.ts';
import type { Lifetime } from './lifetime.ts';
import { ProgressBar, formatCount, formatLoss, note, paint, printable } from './output.ts';

/** The layers' mean of the aux loss: 1 when all experts are equally busy. */
export function meanAux(report: StepReport): number | null {
  const values = report.auxLoss.filter((value): value is number => value !== null);
  return values.length === 0 ? null : values.reduce((sum, value) => sum + value, 0) / values.length;
}

/** A step in one line of a log. */
export function stepLine(report: StepReport, tokensPerSecond: number | null): string {
  const norm = report.gradientNorm === null ? 'not finite' : report.gradientNorm.toFixed(3);
  const speed = tokensPerSecond === null ? '' : ` ${formatCount(tokensPerSecond)} tok/s`;
  const skipped = report.skipped ? ' skipped' : '';
  return `step ${report.step} loss ${formatLoss(report.loss)} aux ${formatLoss(meanAux(report))} norm ${norm} lr ${report.learningRate.toExponential(2)}${speed}${skipped}`;
}

/** Any event in one line of a log. */
export function eventLine(event: RunEvent): string {
  switch (event.type) {
    case 'phase':
      return event.phase;
    case 'step':
      return stepLine(event.report, event.tokensPerSecond);
    case 'eval':
      return `eval at step ${event.step}: validation loss ${event.loss.toFixed(4)}`;
    case 'checkpoint':
      return `checkpoint of step ${event.step}: ${event.directory}`;
    case 'way':
      return `${event.workers} worker${event.workers === 1 ? '' : 's'}, exchange ${event.exchange}: ${event.reason}`;
    case 'rollback':
      return `back from step ${event.fromStep} to step ${event.toStep}: the loss ${formatLoss(event.loss)} was above ${formatLoss(event.threshold)}`;
    case 'fault':
      return `fault: ${event.what} (${event.error.code}: ${event.error.message})`;
  }
}

/** What `note`s of a run look like on stderr. */
function announce(event: RunEvent): void {
  if (event.type === 'step') {
    if (event.report.skipped) note(paint('yellow', `step ${event.report.step} skipped: the gradient of ${event.report.nonFinite ?? 'a parameter'} was not finite`, process.stderr));
    return;
  }
  note(event.type === 'fault' ? paint('yellow', printable(eventLine(event)), process.stderr) : printable(eventLine(event)));
}

/** Shows events until they end or the lifetime does; `onEvent` sees each one first. */
export async function followRun(
  life: Lifetime,
  events: AsyncIterable<RunEvent>,
  { label, steps, onEvent }: { label: string; steps: number; onEvent?: (event: RunEvent) => void },
): Promise<void> {
  const bar = new ProgressBar(label);
  const iterator = events[Symbol.asyncIterator]();
  try {
    for (;;) {
      const next = await life.until(iterator.next());
      if (next.done === true) return;
      const event = next.value;
      onEvent?.(event);
      announce(event);
      if (event.type === 'step') {
        const { report, tokensPerSecond } = event;
        const detail = `step ${report.step}/${steps} loss ${formatLoss(report.loss)} aux ${formatLoss(meanAux(report))} ${formatCount(tokensPerSecond)} tok/s`;
        bar.update(report.step, steps, detail);
      }
    }
  } finally {
    bar.end();
    await iterator.return?.();
  }
}
