/** A process with a supervisor in it, for the test that kills it: told a config and a count, it tells its workers' process ids. */
import type { Config } from '../../config/schema.ts';
import { startSupervisor } from '../../workers/main.ts';

process.once('message', ({ config, count }: { config: Config; count: number }) => {
  const supervisor = startSupervisor({ config, device: { library: 'cpu', indices: 'cpu' }, count, idPrefix: 'orphan' });
  void supervisor.ready.then(() => process.send!(supervisor.workers().map(({ pid }) => pid)));
});
