"""Our recipe ("ours") in comparisons of methods: the same in every benchmark, as options of ``acrlpd train``.

It adds to Q-chunking's recipe: half of each online batch comes from replay, chunks that a success cuts short are kept
(both are the framework's defaults), a moving average of the policy acts, and one compiled call does several updates.
The cheap target uses the best of two candidates with three Euler steps, instead of as many as for acting.
"""

OURS = {
    "agent.critic.num_critics": "2",
    "agent.temperature.no-adaptive": "",
    "agent.top_k": "1",
    "agent.target_samples": "None",
    "agent.target_flow_steps": "None",
    "agent.policy_ema_decay": "0.998",
    "updates_per_call": "5",
}
CHEAP_TARGET = {"agent.target_samples": "2", "agent.target_flow_steps": "3"}
