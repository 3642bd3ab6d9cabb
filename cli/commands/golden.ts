/**
 * `doctor --golden FILE`: prints the largest error of each thing that a golden model records against its tolerance, and
 * fails with GOLDEN_MISMATCH past it. What is compared, and how, is workers/model/golden.ts. Called by doctor.ts.
 */
import { NnError } from '../../config/errors.ts';
import { checkGolden } from '../../workers/model/golden.ts';
import { paint, printResult, table } from '../output.ts';

/** Reads `cpu` or `cuda:N`. Throws USAGE. */
export function parseDevice(text: string): { library: 'cpu' | 'cuda'; index: number } {
  const match = /^(?:cpu|cuda:(\d{1,3}))$/.exec(text);
  if (match === null) throw new NnError('USAGE', `--device is ${JSON.stringify(text)}, but must be cpu or cuda:N`);
  return match[1] === undefined ? { library: 'cpu', index: 0 } : { library: 'cuda', index: Number(match[1]) };
}

/** Throws GOLDEN_MISMATCH naming the worst check; FILE_NOT_FOUND and others from reading and computing. */
export async function runGolden(file: string, device: string, json: boolean | undefined): Promise<void> {
  const checks = await checkGolden(file, parseDevice(device));
  printResult(json, { golden: file, device, ok: checks.every(({ ok }) => ok), checks }, () =>
    table(
      [{ title: '' }, { title: 'CHECK' }, { title: 'LARGEST ERROR', align: 'right' }, { title: 'TOLERANCE', align: 'right' }, { title: 'MEASURE' }],
      checks.map(({ name, error, tolerance, ok, measure }) => [
        ok ? paint('green', 'ok') : paint('red', 'no'),
        name,
        error.toExponential(2),
        tolerance === 0 ? 'equal' : tolerance.toExponential(0),
        measure,
      ]),
    ),
  );
  const wrong = checks.filter(({ ok }) => !ok);
  if (wrong.length > 0) {
    const [first] = wrong;
    throw new NnError('GOLDEN_MISMATCH', `${wrong.length} of ${checks.length} checks of ${file} fail, first ${first!.name}: ${first!.error.toExponential(2)} against ${first!.tolerance}`);
  }
}
