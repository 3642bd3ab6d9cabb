/**
 * An orchestrator in a process of its own, so that a test can kill it: forked with the settings as JSON in argv[2]; says
 * `ready` to its parent.
 */
import { pino } from 'pino';
import { loadConfig } from '../../config/schema.ts';
import { startOrchestrator } from '../../orchestrator/main.ts';

await startOrchestrator({ config: loadConfig(JSON.parse(process.argv[2]!) as object), logger: pino({ level: 'silent' }) });
process.send!('ready');
process.on('disconnect', () => process.exit(0));
