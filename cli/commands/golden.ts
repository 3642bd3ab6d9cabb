/**
 * `doctor --golden FILE`: prints the largest error of each thing that a golden model records against its tolerance, and
 * fails with GOLDEN_MISMATCH past it. What is compared, and how, is workers/model/golden.ts. Called by doctor.ts.
 */
import { NnError } from '../../config/errors.ts';
import type { Precision } from '../../config/run-spec.ts';
import { checkGolden } from '../../workers/model/golden.ts';
import { paint, printResult, table } from '../output.ts';

/** Reads `cpu` or `cuda:N`. Throws USAGE. */
export function parseDevice(text: string): { library: 'cpu' | 'cuda'; index: number } {
  const match = /^(?:cpu|cuda:(\d{1,3}))$/.exec(text);
  if (match === null) throw new NnError('USAGE', `--device is ${JSON.stringify(text)}, but must be cpu or cuda:N`);
  return match[1] === undefined ? { library: 'cpu', index: 0 } : { library: 'cuda', index: Number(match[1]) };
}

/** Reads `fp32` or `bf16`. Throws USAGE. */
export function parsePrecision(text: string): Precision {
  if (text === 'fp32' || text === 'bf16') return text;
  throw new NnError('USAGE', `--precision is ${JSON.stringify(text)}, but must be fp32 or bf16`);
}

/** Throws GOLDEN_MISMATCH naming the first check that fails; FILE_NOT_FOUND and others from reading and computing; DEVICE_UNSUPPORTED for bf16 on a CPU. */
export function runGolden(file: string, device: string, precision: string, threads: number, json: boolean | undefined): void {
  const report = checkGolden(file, { ...parseDevice(device), threads }, parsePrecision(precision));
  printResult(json, { ...report, device }, () =>
    table(
      [{ title: '' }, { title: 'CHECK' }, { title: 'LARGEST ERROR', align: 'right' }, { title: 'TOLERANCE', align: 'right' }, { title: 'MEASURE' }],
      report.rows.map(({ what, measure, error, tolerance, passed }) => [
        passed ? paint('green', 'ok') : paint('red', 'no'),
        what,
        error === 0 ? '0' : error.toExponential(2),
        tolerance === 0 ? 'equal' : tolerance.toExponential(0),
        measure,
      ]),
    ),
  );
  const wrong = report.rows.filter(({ passed }) => !passed);
  const [first] = wrong;
  if (first === undefined) return;
  const where = first.worst === undefined ? '' : ` at ${first.worst}`;
  const errors = `${first.error.toExponential(2)} against ${first.tolerance.toExponential(0)}`;
  throw new NnError('GOLDEN_MISMATCH', `${file}: ${wrong.length} of ${report.rows.length} checks fail, first ${first.what}${where}: ${errors}`);
}
