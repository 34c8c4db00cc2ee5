"""What "ours" means where methods are compared: the same in every benchmark, as options of ``acrlpd train``.

Beside Q-chunking's recipe: half of each online batch from replay, chunks that a success cuts short kept (both the
framework's defaults), a moving average of the policy acts, and several updates in one compiled call. With the cheap
target, its value is the best of two candidates by three Euler steps, instead of as many as while acting.
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
