/**
 * Holds trainers with different forms of master weights to the same float32 state. Owns the steps and what is compared after them;
 * which trainers, on which device and from which gradients is the callers' to say: the trainer's unit test and the GPU's suite.
 */
import { expect } from 'chai';
import type { Trainer } from '../../workers/model/trainer.ts';

const bytes = (values: Float32Array): Buffer => Buffer.from(values.buffer, values.byteOffset, values.byteLength);

/**
 * `whole` and `halves`, initialised alike, take three steps of the same gradients, element `at` of step t being gradientAt(at, t), and
 * have the same digests, weights and moments to the bit; `other` takes all of it over. A flat range of `window` elements is read too.
 */
export function expectSameState(
  [whole, halves, other]: readonly [Trainer, Trainer, Trainer], gradientAt: (at: number, step: number) => number,
  window: { readonly offset: number; readonly length: number },
): void {
  expect(halves.stateDigest()).to.equal(whole.stateDigest());
  const gradient = new Float32Array(whole.flatLength); // zero in the padding
  for (let step = 1; step <= 3; step++) {
    for (const { offset, length } of whole.parameters) for (let at = offset; at < offset + length; at++) gradient[at] = gradientAt(at, step);
    for (const trainer of [whole, halves]) {
      trainer.beginStep();
      trainer.writeGradient(0, gradient);
      expect(trainer.applyStep(step).skipped).to.equal(false);
    }
    expect(halves.stateDigest()).to.equal(whole.stateDigest());
  }
  expect(halves.weightsDigest()).to.equal(whole.weightsDigest());
  for (const parameter of whole.parameters) {
    for (const kind of ['weight', 'm', 'v'] as const) {
      const [wanted, given] = [new Float32Array(parameter.length), new Float32Array(parameter.length)];
      whole.readState(kind, parameter, wanted);
      halves.readState(kind, parameter, given);
      expect(bytes(given).equals(bytes(wanted)), `${kind} of ${parameter.name}`).to.equal(true);
      other.writeState(kind, parameter, given);
    }
  }
  expect(other.stateDigest()).to.equal(whole.stateDigest());
  const [flat, flatWanted] = [new Float32Array(window.length), new Float32Array(window.length)];
  halves.readFlat('weight', window.offset, flat);
  whole.readFlat('weight', window.offset, flatWanted);
  expect(bytes(flat).equals(bytes(flatWanted)), 'a flat range of the weights').to.equal(true);
}
