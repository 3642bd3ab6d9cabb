/**
 * The state of runs, workers and queues in Prometheus' text format. PURE. Called by server.ts for GET /metrics.
 */
import type { QueueName, RunRecord, WorkerRecord } from '../../config/messages.ts';
import type { QueueCounts } from '../queues.ts';
import type { StoreCounters } from './store.ts';

type Sample = readonly [labels: Readonly<Record<string, string>>, value: number | null];

const escape = (value: string): string => value.replace(/\\/g, '\\\\').replace(/"/g, '\\"').replace(/\n/g, '\\n');

function family(name: string, help: string, samples: readonly Sample[]): string {
  const lines = samples.flatMap(([labels, value]) => {
    if (value === null || !Number.isFinite(value)) return [];
    const text = Object.entries(labels).map(([key, label]) => `${key}="${escape(label)}"`).join(',');
    return [`${name}${text === '' ? '' : `{${text}}`} ${value}`];
  });
  return [`# HELP ${name} ${help}`, `# TYPE ${name} gauge`, ...lines, ''].join('\n');
}

function countBy<Item>(items: readonly Item[], key: (item: Item) => string, name: string): Sample[] {
  const counts = new Map<string, number>();
  for (const item of items) counts.set(key(item), (counts.get(key(item)) ?? 0) + 1);
  return [...counts].map(([value, count]) => [{ [name]: value }, count]);
}

/** Runs that are over count by phase only, so that the number of series stays bounded by what goes on. */
export function prometheusText(runs: readonly RunRecord[], workers: readonly WorkerRecord[], queues: Readonly<Record<QueueName, QueueCounts>>, moved: StoreCounters): string {
  const live = runs.filter(({ phase }) => phase === 'running' || phase === 'pausing' || phase === 'paused');
  const ofRun = (value: (record: RunRecord) => number | null): Sample[] => live.map((record) => [{ run: record.run }, value(record)]);
  return [
    family('nn_runs', 'Runs by phase.', countBy(runs, ({ phase }) => phase, 'phase')),
    family('nn_run_step', 'Steps done.', ofRun(({ step }) => step)),
    family('nn_run_steps', 'Steps in all.', ofRun(({ steps }) => steps)),
    family('nn_run_loss', 'Cross-entropy of the last step, nats a token.', ofRun(({ lastReport }) => lastReport?.loss ?? null)),
    family('nn_run_validation_loss', 'Cross-entropy on the validation data, nats a token.', ofRun(({ validation }) => validation?.loss ?? null)),
    family('nn_run_tokens_per_second', 'Tokens trained on in a second.', ofRun(({ tokensPerSecond }) => tokensPerSecond)),
    family('nn_run_workers', 'Workers that share a step.', ofRun(({ way }) => way?.workers ?? null)),
    family('nn_run_skipped_steps', 'Steps skipped because their gradient was not finite.', ofRun(({ skippedSteps }) => skippedSteps)),
    family('nn_run_rollbacks', 'Times that a loss spike rolled the run back.', ofRun(({ rollbacks }) => rollbacks.length)),
    family('nn_run_attempt', 'Attempts at the run.', ofRun(({ attempts }) => attempts.at(-1)?.number ?? null)),
    family('nn_run_running_seconds', 'Time in phase running, over all attempts.', ofRun(({ runningMs }) => runningMs / 1000)),
    family('nn_run_faults', 'Faults by code.', live.flatMap(({ run, faultCounts }) => Object.entries(faultCounts).map(([code, count]): Sample => [{ run, code }, count]))),
    family('nn_run_epoch', 'Times that jobs of the run were given up.', ofRun(({ epoch }) => epoch)),
    family('nn_workers', 'Live workers by state.', countBy(workers, ({ state }) => state, 'state')),
    family('nn_store_sent_bytes', 'Bytes of files that the store has sent to workers since it began.', [[{}, moved.sentBytes]]),
    family('nn_store_received_bytes', 'Bytes of checkpoints that the store has received from workers since it began.', [[{}, moved.receivedBytes]]),
    family('nn_queue_jobs', 'Jobs in the queues by state.', Object.entries(queues).flatMap(([queue, counts]) =>
      Object.entries(counts).map(([state, count]): Sample => [{ queue, state }, count]))),
  ].join('');
}
