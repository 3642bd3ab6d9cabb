/**
 * What a step of a simulated world computes: a replica's state is a chain, state(t) = mix(state(t-1), data of t), so that a step
 * computed on a wrong version shows in all that follows. PURE. Used by the parts of the world, and by what they are held to.
 */
import { dataStep } from '../../config/branches.ts';
import type { Return } from '../../config/branches.ts';

const mix = (state: number, step: number): number => (Math.imul(state ^ step, 0x9e3779b1) + step) >>> 0;

/** The state after step `step`, on the branch that these rollbacks led to. */
export const stepFrom = (state: number, step: number, rollbacks: readonly Return[] | undefined): number => mix(state, dataStep(rollbacks, step));

const chain: number[] = [1];
/** Version `version` of the branch that these rollbacks led to. */
export const chainAt = (version: number, rollbacks: readonly Return[] = []): number => {
  if (rollbacks.length === 0) {
    for (let step = chain.length; step <= version; step++) chain.push(mix(chain[step - 1]!, step));
    return chain[version]!;
  }
  let state = 1;
  for (let step = 1; step <= version; step++) state = stepFrom(state, step, rollbacks);
  return state;
};

const digest = (state: number, salt: number): string => mix(state, salt).toString(16).padStart(8, '0').repeat(4);
/** Of a shard's gradient, computed on the version of that state. */
export const shardDigest = (state: number, shard: number): string => digest(state, shard);
export const sumDigest = (state: number): string => digest(state, 99);
export const replicaDigest = (state: number): string => digest(state, 7);
export const weightsDigest = (state: number): string => digest(state, 8);
